"""``epmq-gptq report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import EPMQInputError
from ..report import PAGE_NAME
from .common import Json, Quiet, Verbose, examples, place, running


@examples(
    ("a page in the checkpoint's folder", "epmq-gptq report merged-4bit"),
    (
        "beside plain GPTQ of the same merge",
        "epmq-gptq report merged-4bit --baseline plain-4bit --out report.html",
    ),
    ("the figures alone", "epmq-gptq report merged-4bit --json - | jq .experts"),
)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The quantized checkpoint.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help=f"File of the page, .html. Default {PAGE_NAME} in DIR; with --json none.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same merge under plain GPTQ (profile: gptq)."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="File of `epmq-gptq retention`. Default epmq_evaluation.json of DIR, if there."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run did to each expert, module by module: one HTML file that needs no network."""
    from ..publish.page.sources import Sources, check_no_input, check_page, is_input

    inputs = [one for one in (folder, baseline, evaluation) if one is not None]
    # Not even an error may be written over what is read.
    clash = json_report is not None and is_input(json_report, inputs)
    file = None if clash else json_report
    with running(file, quiet, verbose, interrupted="no report was written.") as run:
        if clash:
            check_no_input(json_report, "--json", inputs)
        folder, baseline, evaluation = (
            None if one is None else place(one) for one in (folder, baseline, evaluation)
        )
        page = None if out is None else place(out)
        if page is None and json_report is None:
            page = folder / PAGE_NAME
        if page is None and open_page:
            raise EPMQInputError(
                "`--open` needs a page, and with `--json` alone none is made.",
                code="EPMQ-O03",
                subject="`--open`",
                remedy="Say with `--out` where the page goes.",
            )
        sources = Sources.read(folder, baseline, evaluation)
        if page is not None:
            check_page(page, inputs, overwrite)
        figures = sources.figures()
        for note in sources.notes():
            run.reporter.note(note)
        from ..publish.page.table import expert_table

        run.show(expert_table(figures))
        if page is not None:
            from ..io.output import write_whole
            from ..publish.page.render import page_of

            write_whole(page, page_of(figures))
            run.reporter.step("page", str(page))
        run.write(figures)
        if open_page:
            typer.launch(page.resolve().as_uri())
