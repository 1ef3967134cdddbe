"""``epmq-gptq push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .common import Json, Quiet, Run, Verbose, examples, place, running

if TYPE_CHECKING:
    from ..publish.push import Pushed


@examples(
    ("what would be sent, and whether it is fit", "epmq-gptq push merged-4bit me/m --dry-run"),
    ("a private repository", "epmq-gptq push merged-4bit me/merged-4bit --private"),
    ("propose it to others", "epmq-gptq push merged-4bit org/merged-4bit --create-pr"),
)
def push(
    folder: Annotated[Path, typer.Argument(help="Of a GPTQ checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="org/name on the hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
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
        bool,
        typer.Option("--with-code", help="Also the code that the model brings (auto_map)."),
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check, list files and sizes, and send nothing."),
    ] = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint to a hub: only what it needs, checked first, shown by one commit.

    A push that broke off is simply started again: what the hub has is not sent twice."""
    interrupted = "nothing of it shows in the repository. The same command goes on from here."
    with running(json_report, quiet, verbose, interrupted=interrupted) as run:
        with run.reporter.quiet_host():
            from ..publish.push import push as push_folder

            done = push_folder(
                place(folder),
                repo_id,
                private=private or None,
                revision=revision,
                create_pr=create_pr,
                with_report=with_report,
                with_code=with_code,
                commit_message=message,
                dry_run=dry_run,
                reporter=run.reporter,
            )
        _print(run, done)
        run.write(done.to_dict())


def _print(run: Run, done: Pushed) -> None:
    from ..io.console import human_size

    reporter = run.reporter
    if done.url is None:
        run.show(_files(done))
    if done.left:
        reporter.step("stays here", ", ".join(done.left))
    for what in done.created:
        reporter.step("created", f"{what} {done.revision if what == 'branch' else done.repo_id}")
    if done.removed:
        reporter.step("removed", f"weights of an earlier model: {', '.join(done.removed)}")
    total = f"{human_size(done.bytes)} in {len(done.files)} files"
    if done.url is None:
        reporter.step("would push", f"{done.repo_id}@{done.revision}: {total}")
    elif done.unchanged:
        reporter.step("unchanged", f"{done.url} has all of it: {total}")
    else:
        reporter.step("pushed", f"{done.url}: {total}")


def _files(done: Pushed) -> Table:
    from ..io.console import human_size

    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for name, size in done.files.items():
        table.add_row(Text(name), human_size(size))
    table.add_section()
    table.add_row(f"{len(done.files)} files", human_size(done.bytes), style="bold")
    return table
