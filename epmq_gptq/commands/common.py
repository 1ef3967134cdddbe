"""What several commands share: their options, examples, and the way they begin and end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import RenderableType
from rich.markup import escape

from .. import __version__
from ..errors import EPMQError, EPMQInputError
from ..exit_codes import ExitCode
from ..io.console import Reporter
from .completion import devices

Function = TypeVar("Function", bound=Callable[..., None])

_OUTPUT = "Output"

Out = Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the result as JSON to this file, or what went wrong; - for stdout, where "
        "nothing else goes then.",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Say nothing of the course of it: warnings, errors, and what was asked for remain.",
        rich_help_panel=_OUTPUT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; default: a GPU where torch sees one.", autocompletion=devices),
]
Full = Annotated[bool, typer.Option("--full", help="Show every layer, however many.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Show GPTQModel's own log, and tracebacks.",
        rich_help_panel=_OUTPUT,
    ),
]


class Run:
    """One run of one command: where it speaks, and what it leaves for a machine.

    Attributes:
        reporter: the streams.
    """

    def __init__(self, json_report: Path | None, quiet: bool, verbose: bool):
        self._file = json_report
        self._is_piped = str(json_report) == "-"
        self.reporter = Reporter(verbose=verbose, quiet=quiet, piped=self._is_piped)

    def show(self, *lines: RenderableType, **options: Any) -> None:
        """Print what was asked for, also with ``--quiet``; rich's options of ``print`` apply."""
        self.reporter.result.print(*lines, **options)

    def write(self, result: dict[str, Any]) -> None:
        """Leave the result for ``--json``: to be called once, at the end, by every command."""
        if self._put(result) and not self._is_piped:
            self.reporter.step("report", str(self._file))

    def keep(self) -> None:
        """What stands where ``--json`` points to is not ours to replace, not even with an error."""
        self._file = None

    def _put(self, result: dict[str, Any]) -> bool:
        if self._file is None:
            return False
        text = json.dumps({"epmq_gptq": __version__} | result, indent=2, default=str) + "\n"
        if self._is_piped:
            self.reporter.stdout.write(text)
            self.reporter.stdout.flush()
        else:
            self._file.write_text(text, encoding="utf-8")
        return True

    def _open(self) -> None:
        """Refuse a place that cannot be written to while that costs nothing."""
        from .targets import check_file

        if self._file is not None and not self._is_piped:
            self._file = place(self._file)
            check_file(self._file, "--json")

    def _write_error(self, error: BaseException) -> None:
        # The place itself may be what is wrong, and the error is on stderr as well.
        with contextlib.suppress(OSError, EPMQInputError):
            if self._file is not None and not self._is_piped:
                self._file = place(self._file)
            self._put({"error": parts_of(error), "exit_code": int(ExitCode.of(error))})


@contextlib.contextmanager
def running(
    json_report: Path | None = None,
    quiet: bool = False,
    verbose: bool = False,
    *,
    interrupted: str = "no checkpoint was written.",
) -> Iterator[Run]:
    """The frame of every command: ``--json``, ``--quiet``, ``--verbose``, errors, exit codes.

        def card(folder: Folder, json_report: Json = None, quiet: Quiet = False,
                 verbose: Verbose = False) -> None:
            with running(json_report, quiet, verbose) as run:
                run.reporter.step("read", folder.name)  # the course of it
                run.show(table)                         # what was asked for
                run.write({"card": text})               # the same for a machine

    Args:
        interrupted: what an interrupt leaves behind.

    Raises:
        SystemExit: something went wrong; see :class:`~epmq_gptq.exit_codes.ExitCode`.
    """
    run = Run(json_report, quiet, verbose)
    with run.reporter.exit_codes(run._write_error, interrupted=interrupted):
        run._open()
        yield run


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
    command = "epmq-gptq" if context is None else _command_of(context)
    with running(_json_place(sys.argv[1:] if arguments is None else arguments)):
        cause = message[:1].lower() + message[1:].rstrip(".") + "."
        raise EPMQInputError(
            cause.replace("?.", "?"),
            code="EPMQ-O02" if message.startswith("No such") else "EPMQ-O01",
            subject=f"`{command}`",
            remedy=f"`{command} --help` shows what there is.",
        )


def _command_of(context: Any) -> str:
    """Without the program's own name, which may be `python -m epmq_gptq`."""
    name = context.info_name if context.parent is not None else ""
    return f"epmq-gptq {name}".strip()


def _json_place(arguments: Sequence[str]) -> Path | None:
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--json" and (equals or index + 1 < len(arguments)):
            return Path(value if equals else arguments[index + 1])
    return None


def parts_of(error: BaseException) -> dict[str, str | None]:
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


# ---- help ----------------------------------------------------------------------------------------


def examples(*shown: tuple[str, str]) -> Callable[[Function], Function]:
    """Give a command examples for its ``--help`` and its page of the documentation.

    Args:
        shown: (what it does, the command line) each.
    """

    def mark(function: Function) -> Function:
        function.examples = shown  # type: ignore[attr-defined]
        return function

    return mark


def examples_of(function: Callable[..., Any]) -> tuple[tuple[str, str], ...]:
    """What :func:`examples` gave a command."""
    return getattr(function, "examples", ())


def examples_text(function: Callable[..., Any]) -> str:
    """The examples in rich's markup, for the end of a help."""
    shown = (
        f"[dim]# {escape(about)}[/dim]\n{escape(line)}" for about, line in examples_of(function)
    )
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(shown)


# ---- options -------------------------------------------------------------------------------------


def pairs(values: list[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dict.

    Raises:
        EPMQInputError: one without a name or a value, or a name given twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise EPMQInputError(
                f"`{option}` should be of the form name=value, got `{value}`.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Write it so, without spaces around the sign.",
            )
        if name in pairs:
            raise EPMQInputError(
                f"`{option}`: `{name}` is given twice.",
                code="EPMQ-O01",
                subject=f"`{option}`",
                remedy="Keep one.",
            )
        pairs[name] = text
    return pairs


def values(values: list[str], option: str) -> dict[str, Any]:
    """``key=value`` options as a dict; values are read as YAML."""
    from ..io.yaml_files import parse_yaml

    result = {}
    for key, value in pairs(values, option).items():
        try:
            result[key] = parse_yaml(value)
        except EPMQInputError as error:
            raise error.within(f"`{option} {key}`") from error
    return result


def place(path: Path) -> Path:
    """The path of an option; a shell leaves the ``~`` of ``--out=~/x`` as it is.

    Raises:
        EPMQInputError: it starts in the home of a user that this machine does not know.
    """
    from ..io.yaml_files import resolve_path

    return resolve_path(str(path), Path())


def print_checkpoint(reporter: Reporter, out: Path) -> None:
    """The size of what was written, and that the host gave warnings."""
    from ..io.console import human_size
    from .summary import folder_size

    size, files = folder_size(out)
    reporter.step("checkpoint", f"{out}: {human_size(size)} in {files} files")
    if reporter.host.alarms:
        count = len(reporter.host.alarms)
        reporter.note(f"GPTQModel gave {count} warnings on the way; --verbose shows them.")
