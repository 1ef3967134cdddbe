"""One operation, two doors: a Python function and a command of the shell, made of one signature.

    @operation(("read it first", "epmq-gptq card merged-4bit --dry-run"))
    def card(
        folder: Annotated[str | Path, typer.Argument(help="Of a checkpoint."), PATH],
        *,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
        reporter: Reporter,
    ) -> CardResult: ...

``card("merged-4bit", dry_run=True)`` is then a call of Python, in which ``progress=True`` takes the
place of ``reporter``, and ``card.command`` is the function that typer makes ``epmq-gptq card`` of,
with ``--json``, ``--quiet`` and ``--verbose``. Where a shell writes a value in another form than
Python does, the annotation has a :class:`Form`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import json
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..errors import EPMQError, EPMQInputError, EPMQWarning, ExitCode
from ..io.console import Reporter

# Of a table in a notebook, whose cells scroll; `str()` of a result has it, too.
_WIDTH = 160
# Colours and lines of rich; the notebook keeps its own background, light or dark.
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2">{code}</pre>'


class Result:
    """What an operation returns.

    A notebook shows its table; ``str()`` is the same as plain text.

    Attributes:
        exit_code: with which its command leaves.
    """

    exit_code = ExitCode.OK

    def to_dict(self) -> dict[str, Any]:
        """What the command writes with ``--json``, as plain data."""
        raise NotImplementedError

    def print_to(self, console: Console) -> None:
        """Print the table of it."""
        raise NotImplementedError

    def show(self, reporter: Reporter) -> None:
        """What the command prints at its end."""
        self.print_to(reporter.result)

    def _recorded(self) -> Console:
        # force_jupyter: rich would otherwise display it right now.
        console = Console(
            file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True
        )
        self.print_to(console)
        return console

    def _repr_html_(self) -> str:
        return self._recorded().export_html(code_format=_HTML, inline_styles=True)

    def __str__(self) -> str:
        return self._recorded().export_text()


@dataclass(frozen=True)
class Form:
    """How the two doors write one value.

    Attributes:
        shell: the type that typer reads; None: the shell has no such option.
        use: what was given → what the operation gets.
        read: (what typer read, the option's name) → the same, where a shell writes it otherwise.
        shell_help, python_help: added to the help of the option and of the keyword.
    """

    shell: Any
    read: Callable[[Any, str], Any] | None = None
    use: Callable[[Any], Any] = lambda value: value
    shell_help: str = ""
    python_help: str = ""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operation, as its annotation declares it."""

    name: str
    default: Any
    type: Any
    info: Any  # typer's
    form: Form

    @classmethod
    def of(cls, declared: inspect.Parameter) -> Parameter:
        kind, *notes = typing.get_args(declared.annotation)
        form = next((note for note in notes if isinstance(note, Form)), Form(kind))
        info = next((note for note in notes if not isinstance(note, Form)), None)
        return cls(declared.name, declared.default, kind, info, form)

    @property
    def option(self) -> str:
        """``--name`` on the shell."""
        names = [self.info.default, *(self.info.param_decls or ())]
        given = [name for name in names if isinstance(name, str) and name.startswith("--")]
        return given[0] if given else f"--{self.name.replace('_', '-')}"

    @property
    def help(self) -> str:
        """Of the Python keyword."""
        return f"{self.info.help} {self.form.python_help}".rstrip()

    def of_command(self) -> inspect.Parameter:
        """The same as typer reads it."""
        info = copy.copy(self.info)
        info.help = f"{info.help} {self.form.shell_help}".rstrip()
        # A list of typer's has no other default than None.
        default = None if self.default == () else self.default
        kind = self.form.shell if default is not None else Optional[self.form.shell]  # noqa: UP045
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, info],
        )

    def from_shell(self, value: Any) -> Any:
        if value is None or value == []:
            return self.default
        return (
            self.form.use(value) if self.form.read is None else self.form.read(value, self.option)
        )

    def from_python(self, value: Any) -> Any:
        return value if value is None else self.form.use(value)


def operation(
    *examples: tuple[str, str],
    interrupted: str = "no checkpoint was written.",
    completed: Callable[[dict[str, Any], Run], None] | None = None,
) -> Callable[[Callable[..., Result]], Callable[..., Any]]:
    """Make an operation of a function that takes a ``reporter``; see the top of this file.

    Args:
        examples: (what it does, the command line) each, for ``--help`` and the documentation.
        interrupted: what an interrupt of the command leaves behind.
        completed: called with the values of a command line before it runs; puts in or refuses
            what is so on a shell only.
    """

    def make(function: Callable[..., Result]) -> Callable[..., Any]:
        declared = inspect.signature(function)
        parameters = {
            name: Parameter.of(each)
            for name, each in declared.parameters.items()
            if name != "reporter"
        }
        call = _of_python(function, declared, parameters)
        call.command = _of_shell(function, parameters, interrupted, completed)
        call.command.examples = examples
        call.parameters = parameters
        return call

    return make


# ---- Python --------------------------------------------------------------------------------------


def _of_python(
    function: Callable[..., Result],
    declared: inspect.Signature,
    parameters: dict[str, Parameter],
) -> Callable[..., Any]:
    own = [each for name, each in declared.parameters.items() if name != "reporter"]
    progress = inspect.Parameter(
        "progress", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool
    )
    signature = declared.replace(parameters=[*own, progress])

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Result:
        if not set(options) <= set(signature.parameters):
            from ..io.declared import unknown_key

            key = next(key for key in options if key not in signature.parameters)
            what = f"`{function.__name__}`"
            raise unknown_key(key, signature.parameters, what, what)
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        with _session(given.pop("progress")) as reporter, reporter.quiet_host():
            values = {name: parameters[name].from_python(value) for name, value in given.items()}
            return function(**values, reporter=reporter)

    call.__signature__ = signature
    about, _, raised = inspect.getdoc(function).partition("\n\nRaises:")
    keywords = [f"    {name}: {each.help}" for name, each in parameters.items()]
    call.__doc__ = "\n".join(
        [f"{about}\n\nThe same as ``epmq-gptq {function.__name__}``.\n\nArgs:", *keywords]
        + ["    progress: Say what is going on."]
        + ([f"\nRaises:{raised}"] if raised else [])
    )
    return call


@contextlib.contextmanager
def _session(progress: bool) -> Iterator[Reporter]:
    """The host is quiet and heard, our own warnings are Python's, in the caller's line."""
    reporter = Reporter(quiet=not progress)
    own: dict[str, EPMQWarning] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EPMQWarning)
            try:
                yield reporter
            finally:
                messages = [each.message for each in caught]
                own = {str(each): each for each in messages if isinstance(each, EPMQWarning)}
    finally:
        for warning in own.values():
            # 1 is this line, 2 contextlib's, 3 the function that Python calls, 4 who called it.
            warnings.warn(warning, stacklevel=4)


# ---- the shell -----------------------------------------------------------------------------------

_SHARED = {
    "json_report": (
        Path | None,
        None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the result as JSON to this file, or what went wrong; - for stdout, where "
            "nothing else goes then.",
            rich_help_panel="Output",
        ),
    ),
    "quiet": (
        bool,
        False,
        typer.Option(
            "--quiet",
            "-q",
            help="Say nothing of the course of it: warnings, errors, and what was asked for "
            "remain.",
            rich_help_panel="Output",
        ),
    ),
    "verbose": (
        bool,
        False,
        typer.Option(
            "--verbose",
            help="Show GPTQModel's own log, and tracebacks.",
            rich_help_panel="Output",
        ),
    ),
}


def _of_shell(
    function: Callable[..., Result],
    parameters: dict[str, Parameter],
    interrupted: str,
    completed: Callable[[dict[str, Any], Run], None] | None,
) -> Callable[..., None]:
    shown = {name: each for name, each in parameters.items() if each.form.shell is not None}

    def command(json_report: Path | None, quiet: bool, verbose: bool, **given: Any) -> None:
        with running(json_report, quiet, verbose, interrupted=interrupted) as run:
            values = {name: shown[name].from_shell(value) for name, value in given.items()}
            if completed is not None:
                completed(values, run)
            run.open()
            with run.reporter.quiet_host():
                result = function(**values, reporter=run.reporter)
            result.show(run.reporter)
            run.write(result.to_dict())
        if result.exit_code:
            raise SystemExit(result.exit_code)

    options = [each.of_command() for each in shown.values()]
    options += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )
        for name, (kind, default, info) in _SHARED.items()
    ]
    command.__name__ = function.__name__
    command.__doc__ = inspect.getdoc(function).partition("\n\nRaises:")[0]
    command.__signature__ = inspect.Signature(options)
    command.__annotations__ = {each.name: each.annotation for each in options}
    return command


class Run:
    """One run of one command: where it speaks, and what it leaves for a machine.

    Attributes:
        file: of ``--json``, or None.
        reporter: the streams.
    """

    def __init__(self, json_report: Path | None, quiet: bool, verbose: bool):
        self.file = json_report
        self._is_piped = str(json_report) == "-"
        self.reporter = Reporter(verbose=verbose, quiet=quiet, piped=self._is_piped, asks=True)

    def open(self) -> None:
        """Refuse a path of ``--json`` that cannot be written to while that costs nothing."""
        from .forms import check_file, resolved

        if self.file is not None and not self._is_piped:
            self.file = resolved(self.file)
            check_file(self.file, "--json")

    def keep(self) -> None:
        """What ``--json`` points to is not ours to write over, not even with an error."""
        self.file = None

    def write(self, result: dict[str, Any]) -> None:
        """Leave the result for ``--json``."""
        if self._put(result) and not self._is_piped:
            self.reporter.step("report", str(self.file))

    def _put(self, result: dict[str, Any]) -> bool:
        if self.file is None:
            return False
        text = json.dumps({"epmq_gptq": __version__} | result, indent=2, default=str) + "\n"
        if self._is_piped:
            self.reporter.stdout.write(text)
            self.reporter.stdout.flush()
        else:
            self.file.write_text(text, encoding="utf-8")
        return True

    def write_error(self, error: BaseException) -> None:
        from .forms import resolved

        # The path itself may be what is wrong, and the error is on stderr as well.
        with contextlib.suppress(OSError, EPMQInputError):
            if self.file is not None and not self._is_piped:
                self.file = resolved(self.file)
            self._put({"error": _parts_of(error), "exit_code": int(ExitCode.of(error))})


@contextlib.contextmanager
def running(
    json_report: Path | None = None,
    quiet: bool = False,
    verbose: bool = False,
    *,
    interrupted: str = "no checkpoint was written.",
) -> Iterator[Run]:
    """The frame of every command: ``--json``, ``--quiet``, ``--verbose``, errors, exit codes.

    Args:
        interrupted: what an interrupt leaves behind.

    Raises:
        SystemExit: something went wrong; see :class:`~epmq_gptq.errors.ExitCode`.
    """
    run = Run(json_report, quiet, verbose)
    with run.reporter.exit_codes(run.write_error, interrupted=interrupted):
        yield run


def _parts_of(error: BaseException) -> dict[str, str | None]:
    """An error as plain data; one that is none of ours has no code."""
    if isinstance(error, EPMQError):
        return error.to_dict()
    if isinstance(error, KeyboardInterrupt):
        return {"code": None, "subject": "the run", "cause": "interrupted.", "remedy": ""}
    return {
        "code": None,
        "subject": type(error).__name__,
        "cause": str(error),
        "remedy": "Run again with --verbose for the traceback and GPTQModel's log.",
    }


def usage_failed(error: Any, arguments: Sequence[str] | None) -> None:
    """Say what is wrong with a command line as everything else is said: a line, or JSON.

    Args:
        error: click's UsageError.
        arguments: of the command; None for those of the process.

    Raises:
        SystemExit: always.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was shown
        raise SystemExit(ExitCode.INPUT)
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    # Without the program's own name, which may be `python -m epmq_gptq`.
    name = context.info_name if context is not None and context.parent is not None else ""
    command = f"epmq-gptq {name}".strip()
    with running(_json_path(sys.argv[1:] if arguments is None else arguments)):
        cause = message[:1].lower() + message[1:].rstrip(".") + "."
        raise EPMQInputError(
            cause.replace("?.", "?"),
            code="EPMQ-O02" if message.startswith("No such") else "EPMQ-O01",
            subject=f"`{command}`",
            remedy=f"`{command} --help` shows what there is.",
        )


def _json_path(arguments: Sequence[str]) -> Path | None:
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--json" and (equals or index + 1 < len(arguments)):
            return Path(value if equals else arguments[index + 1])
    return None


def examples_text(command: Callable[..., Any]) -> str:
    """The examples in rich's markup, for the end of a help."""
    shown = (f"[dim]# {escape(about)}[/dim]\n{escape(line)}" for about, line in command.examples)
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(shown)
