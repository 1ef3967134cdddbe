"""``epmq-gptq``: quantize a merge towards its experts, from a shell.

Only light modules are imported here: GPTQModel takes seconds, and neither `--help` nor a TAB in a
shell nor a typo should have to wait for it.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .commands.card import card
from .commands.check import check
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.explain import explain
from .commands.inspect import inspect
from .commands.merge import merge, methods
from .commands.operation import examples_text, usage_failed
from .commands.push import push
from .commands.quantize import quantize
from .commands.report import report
from .commands.requantize import requantize
from .commands.retention import retention
from .errors import ExitCode, Terminated
from .io.interrupts import terminated

# UsageError, of click or of the copy of it that newer versions of typer bring along.
_UsageError = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A command whose help ends with its examples, and for `quantize` with a recipe's keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parts = [examples_text(self.callback)]
        if self.name == "quantize":
            parts.append(_recipe_text())
        self.epilog = "\n\n\n".join(parts)
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """The root, which says what is wrong with a command line as everything else is said."""

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **more: Any) -> Any:
        if not standalone_mode:
            return super().main(args, *rest, standalone_mode=False, **more)
        try:
            code = super().main(args, *rest, standalone_mode=False, **more)
        except _UsageError as error:
            code = usage_failed(error, args)
        except (typer.Abort, KeyboardInterrupt) as error:
            code = ExitCode.TERMINATED if isinstance(error, Terminated) else ExitCode.INTERRUPTED
        raise SystemExit(code or ExitCode.OK)


def _recipe_text() -> str:
    """A recipe's keys, documented where they are defined."""
    from .recipe import recipe_help

    lines = (
        f"{key.strip() if key == key.strip() else '· ' + key.strip()}: {doc}"
        for key, doc in recipe_help()
    )
    return "[bold]Keys of a recipe[/bold] (YAML)\n\n" + "\n\n".join(map(escape, lines))


_EXIT_CODES = "[bold]Exit codes[/bold]\n\n" + "\n".join(
    f"{code.value:>3}  {escape(code.meaning)}" for code in ExitCode
)
_EXPLAIN = "An error ends with its code in brackets; `epmq-gptq explain EPMQ-F21` says more of it."

app = typer.Typer(
    name="epmq-gptq",
    cls=Group,
    help="Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882): a merged model and the "
    "experts it was made of in, a standard GPTQ checkpoint out.",
    epilog=f"{_EXIT_CODES}\n\n{_EXPLAIN}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"epmq-gptq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _command in (
    *(quantize, requantize, inspect, merge, methods),
    *(evaluate, retention, report, check, card, push),
    *(demo, explain),
):
    app.command(cls=Command)(_command.command)


def main() -> None:
    """Entry point of ``epmq-gptq``."""
    signal.signal(signal.SIGTERM, terminated)
    app()
