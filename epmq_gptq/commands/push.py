"""``epmq-gptq push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..console import Reporter
from ..summary import human_size
from ..targets import check_file
from .common import Verbose, place, write_error

if TYPE_CHECKING:
    from ..publishing import Pushed


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
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file; - for stdout.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint to a hub: only what it needs, checked first, shown by one commit.

    A push that broke off is simply started again: what the hub has is not sent twice."""
    reporter = Reporter(verbose=verbose)
    is_piped = str(json_report) == "-"
    file = None if is_piped else json_report
    console = reporter.out
    if is_piped:
        reporter.out = reporter.err
    interrupted = "nothing of it shows in the repository. The same command goes on from here."
    with reporter.exit_codes(lambda error: write_error(file, error), interrupted=interrupted):
        if file is not None:
            file = place(file)
            check_file(file, "--json")
        with reporter.quiet_host():
            from ..publishing import push as push_folder

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
                reporter=reporter,
            )
        if is_piped:
            console.print_json(data=done.to_dict())
        elif file is not None:
            file.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
        _print(reporter, done)


def _print(reporter: Reporter, done: Pushed) -> None:
    if done.url is None:
        reporter.out.print(_files(done))
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
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for name, size in done.files.items():
        table.add_row(Text(name), human_size(size))
    table.add_section()
    table.add_row(f"{len(done.files)} files", human_size(done.bytes), style="bold")
    return table
