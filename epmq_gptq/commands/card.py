"""``epmq-gptq card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Quiet, Verbose, examples, place, running


@examples(
    ("read it before anything is written", "epmq-gptq card merged-4bit --dry-run"),
    (
        "for its repository, under a title",
        "epmq-gptq card merged-4bit --repo-id me/merged-4bit \\\n"
        "    --title 'Math and code in 4 bits'",
    ),
)
def card(
    folder: Annotated[Path, typer.Argument(help="Of a checkpoint that E-PMQ made.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card and write nothing.")
    ] = False,
    repo_id: Annotated[
        str | None, typer.Option(help="org/name that the card's examples load.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the card.")] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Identifier of a hub (apache-2.0), over what all sources declare."),
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="Also give the folder names of local models.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a card that was written or edited by hand."),
    ] = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint's model card anew (README.md), as `save` writes it: after an evaluation,
    with a title or the name of its repository. One that was edited by hand is left alone."""
    with running(json_report, quiet, verbose, interrupted="the card is as it was.") as run:
        folder = place(folder)
        options = dict(repo_id=repo_id, title=title, license=license, include_names=names)
        with run.reporter.quiet_host():
            from ..publish.card import model_card, write_card

            if dry_run:
                text = model_card(folder, **options)
            else:
                text = write_card(folder, overwrite=overwrite, **options)
        if dry_run:
            # As it is: a card is no rich markup, and a long line of a table is one line.
            run.reporter.result.out(text, end="", highlight=False)
        else:
            lines = text.count("\n")
            run.reporter.step("card", f"{folder.name}/README.md: {lines} lines")
        run.write({"card": text, "written": not dry_run})
