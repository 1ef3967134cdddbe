"""``epmq-gptq``: quantize a merge towards its experts, from a shell.

Only light modules are imported here: GPTQModel takes seconds, and `--help` or a typo in a recipe
should not have to wait for it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .commands.check import check
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.inspect import inspect
from .commands.merge import merge, methods
from .commands.quantize import quantize
from .recipe import recipe_help

app = typer.Typer(
    name="epmq-gptq",
    help="Expert-guided post-merge quantization (E-PMQ, arXiv 2605.16882): a merged model and the "
    "experts it was made of in, a standard GPTQ checkpoint out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# A recipe's keys, documented where they are defined.
_RECIPE_HELP = "[bold]Keys of a recipe[/bold] (YAML)\n\n" + "\n\n".join(
    f"{key.strip() if key == key.strip() else '· ' + key.strip()}: {doc}".replace("[", r"\[")
    for key, doc in recipe_help()
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


app.command(epilog=_RECIPE_HELP)(quantize)
for _command in (merge, inspect, check, evaluate, methods, demo):
    app.command()(_command)


def main() -> None:
    """Entry point of ``epmq-gptq``."""
    app()
