"""``card``: a checkpoint's model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter
from . import forms
from .operation import Result, operation


@dataclass(frozen=True, repr=False)
class CardResult(Result):
    """A model card.

    Attributes:
        text: Markdown with the hub's metadata.
        written: whether it is in the checkpoint now.
    """

    text: str
    written: bool

    def to_dict(self) -> dict[str, Any]:
        return {"card": self.text, "written": self.written}

    def print_to(self, console: Console) -> None:
        # As it is: a card is no rich markup, and a long line of a table is one line.
        console.out(self.text, end="", highlight=False)

    def show(self, reporter: Reporter) -> None:
        if not self.written:
            self.print_to(reporter.result)

    def __repr__(self) -> str:
        return f"<CardResult: {len(self.text.splitlines())} lines>"


@operation(
    ("read it before anything is written", "epmq-gptq card merged-4bit --dry-run"),
    (
        "for its repository, under a title",
        "epmq-gptq card merged-4bit --repo-id me/merged-4bit \\\n"
        "    --title 'Math and code in 4 bits'",
    ),
    interrupted="the card is as it was.",
)
def card(
    folder: Annotated[
        str | Path, typer.Argument(help="Of a checkpoint that E-PMQ made."), forms.PATH
    ],
    *,
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
    reporter: Reporter,
) -> CardResult:
    """Write a checkpoint's model card anew (README.md), as `save` writes it: after an evaluation,
    with a title or the name of its repository. One that was edited by hand is left alone.

    Raises:
        EPMQInputError: the checkpoint is none of ours, or its card was edited by hand.
    """
    from ..publish.card import model_card, write_card

    options = dict(repo_id=repo_id, title=title, license=license, include_names=names)
    if dry_run:
        return CardResult(model_card(folder, **options), False)
    text = write_card(folder, overwrite=overwrite, **options)
    lines = text.count("\n")
    reporter.step("card", f"{folder.name}/README.md: {lines} lines")
    return CardResult(text, True)
