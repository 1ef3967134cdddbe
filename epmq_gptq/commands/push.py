"""``push``: a checkpoint to a hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..io.console import Reporter, human_size
from . import forms
from .operation import Result, operation

if TYPE_CHECKING:
    from ..publish.push import Pushed


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What was uploaded.

    Attributes:
        pushed: where to, files and sizes.
    """

    pushed: "Pushed"

    @property
    def url(self) -> str | None:
        """Of the commit or the pull request; None for a dry run."""
        return self.pushed.url

    def to_dict(self) -> dict[str, Any]:
        return self.pushed.to_dict()

    def print_to(self, console: Console) -> None:
        table = Table()
        table.add_column("file", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        for name, size in self.pushed.files.items():
            table.add_row(Text(name), human_size(size))
        table.add_section()
        total = human_size(self.pushed.bytes)
        table.add_row(f"{len(self.pushed.files)} files", total, style="bold")
        console.print(table)

    def show(self, reporter: Reporter) -> None:
        done = self.pushed
        if done.url is None:
            self.print_to(reporter.result)
        if done.left:
            reporter.step("stays here", ", ".join(done.left))
        for what in done.created:
            name = done.revision if what == "branch" else done.repo_id
            reporter.step("created", f"{what} {name}")
        if done.removed:
            reporter.step("removed", f"weights of an earlier model: {', '.join(done.removed)}")
        total = f"{human_size(done.bytes)} in {len(done.files)} files"
        if done.url is None:
            reporter.step("would push", f"{done.repo_id}@{done.revision}: {total}")
        elif done.unchanged:
            reporter.step("unchanged", f"{done.url} has all of it: {total}")
        else:
            reporter.step("pushed", f"{done.url}: {total}")

    def __repr__(self) -> str:
        return f"<PushResult {self.pushed}>"


@operation(
    ("what would be sent, and whether it is fit", "epmq-gptq push merged-4bit me/m --dry-run"),
    ("a private repository", "epmq-gptq push merged-4bit me/merged-4bit --private"),
    ("propose it to others", "epmq-gptq push merged-4bit org/merged-4bit --create-pr"),
    interrupted="nothing of it shows in the repository. The same command goes on from here.",
)
def push(
    folder: Annotated[str | Path, typer.Argument(help="Of a GPTQ checkpoint."), forms.PATH],
    repo_id: Annotated[str, typer.Argument(help="org/name on the hub; made if it is not there.")],
    *,
    private: Annotated[
        bool | None, typer.Option("--private", help="Make the repository private.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is not there, or refs/pr/N.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--with-report", help="Also the report of the run and the evaluation.")
    ] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Also the code that the model brings (auto_map).")
    ] = False,
    commit_message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="In place of the one that is stored on this machine."),
        forms.ONLY_PYTHON,
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, list files and sizes, and send nothing.")
    ] = False,
    reporter: Reporter,
) -> PushResult:
    """Upload a checkpoint to a hub: only what it needs, checked first, shown by one commit.

    A push that broke off is simply started again: what the hub has is not sent twice.

    Raises:
        EPMQInputError: the checkpoint, the token or the repository cannot be used.
        EPMQError: the upload broke off; the same call goes on where it was.
    """
    from ..publish.push import push as push_folder

    done = push_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        with_report=with_report,
        with_code=with_code,
        commit_message=commit_message,
        token=token,
        dry_run=dry_run,
        reporter=reporter,
    )
    return PushResult(done)
