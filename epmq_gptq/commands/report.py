"""``epmq-gptq report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EPMQInputError
from .common import Json, Quiet, Verbose, examples, place, running

if TYPE_CHECKING:
    from ..console import Reporter
    from ..regret import RunReport
    from ..retained import Retention

PAGE_NAME = "epmq_report.html"


@examples(
    ("one page, from disk, without a network", "epmq-gptq report merged-4bit --open"),
    (
        "beside plain GPTQ of the same merge (quantized with `profile: gptq`)",
        "epmq-gptq report merged-4bit --baseline merged-gptq --out report.html",
    ),
    ("the figures alone", "epmq-gptq report merged-4bit --json figures.json"),
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
    json_report: Json = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of these names.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run did to each expert, module by module: one HTML file that needs no network."""
    frame = running(json_report, quiet, verbose, interrupted="no report was written.")
    with frame as command:
        from ..output import write_whole
        from ..regret import read_report, report_figures
        from ..regret.page import page_of
        from ..regret.table import expert_table

        folder = place(folder)
        page = None if out is None else place(out)
        if page is None and json_report is None:
            page = folder / PAGE_NAME
        file = None if json_report is None or str(json_report) == "-" else place(json_report)
        inputs = [folder / "epmq_report.json", evaluation and place(evaluation)]
        inputs += [baseline and place(baseline) / "epmq_report.json"]
        try:
            _check_options(page, file, open_page)
            for target, option in ((page, "--out"), (file, "--json")):
                if target is not None:
                    _check_place(target, option, [i for i in inputs if i], overwrite)
        except EPMQInputError:
            command.keep()
            raise
        run = read_report(folder)
        other = None if baseline is None else read_report(place(baseline))
        kept = _retention(folder, None if evaluation is None else place(evaluation))
        document = report_figures(run, other, kept)
        _note(command.reporter, run, other)
        command.show(expert_table(document))
        if page is not None:
            write_whole(page, page_of(document))
            command.reporter.step("page", str(page))
        command.write(document)
        if page is not None and open_page:
            typer.launch(page.resolve().as_uri())


def _check_options(page: Path | None, file: Path | None, open_page: bool) -> None:
    if page is not None:
        if page.suffix.lower() not in (".html", ".htm"):
            raise EPMQInputError(
                f"`--out` should be a file that ends in .html, got `{page.name}`.",
                code="EPMQ-O01",
                subject="`--out`",
                remedy="Name it so; the figures as JSON go to `--json`.",
            )
    elif open_page:
        raise EPMQInputError(
            "`--open` needs a page, and with `--json` alone none is made.",
            code="EPMQ-O03",
            subject="`--open`",
            remedy="Say with `--out` where the page goes.",
        )
    if file is not None and file.suffix.lower() in (".html", ".htm"):
        raise EPMQInputError(
            f"`--json` should not be a file of a page, got `{file.name}`.",
            code="EPMQ-O01",
            subject="`--json`",
            remedy="Name it .json; the page goes to `--out`.",
        )


def _check_place(target: Path, option: str, inputs: list[Path], overwrite: bool) -> None:
    """Refuse a file that is there already, or that this command reads."""
    from ..targets import check_file

    check_file(target, option)
    if any(target.exists() and source.exists() and target.samefile(source) for source in inputs):
        raise EPMQInputError(
            f"`{option}`: `{target.name}` is what the figures are read from.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another name.",
        )
    if target.exists() and not overwrite:
        raise EPMQInputError(
            f"`{option}`: `{target.name}` exists.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another name or pass --overwrite.",
        )


def _retention(folder: Path, file: Path | None) -> Retention | None:
    from ..retained import read_retention

    if file is None:
        return read_retention(folder)
    found = read_retention(file.parent, file.name)
    if found is None:
        raise EPMQInputError(
            f"`--evaluation`: there is no file `{file.name}`.",
            code="EPMQ-F15",
            subject="`--evaluation`",
            remedy="Make it with `epmq-gptq retention`.",
        )
    return found


def _note(reporter: Reporter, run: RunReport, baseline: RunReport | None) -> None:
    """What a reader of the figures should know."""
    if not run.is_measured:
        reporter.note("this run measured no figures per expert; the page has its modules and times")
    if baseline is not None:
        bits = [{(one.bits, one.group_size) for one in each.modules} for each in (run, baseline)]
        if bits[0] != bits[1]:
            reporter.note("the baseline has other bits or groups than this run")
