"""``epmq-gptq card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Reporter
from .common import Verbose, place


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
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint's model card anew (README.md), as `save` writes it: after an evaluation,
    with a title or the name of its repository. One that was edited by hand is left alone."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes(interrupted="the card is as it was."):
        folder = place(folder)
        options = dict(repo_id=repo_id, title=title, license=license, include_names=names)
        with reporter.quiet_host():
            from ..card import model_card, write_card

            if dry_run:
                text = model_card(folder, **options)
            else:
                text = write_card(folder, overwrite=overwrite, **options)
        if dry_run:
            # As it is: a card is no rich markup, and a long line of a table is one line.
            reporter.out.out(text, end="", highlight=False)
            return
        lines = text.count("\n")
        reporter.step("card", f"{folder.name}/README.md: {lines} lines")
