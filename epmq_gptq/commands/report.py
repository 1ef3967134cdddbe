"""``report``: what a run did to each expert."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter
from . import forms
from .operation import Result, Run, operation


@dataclass(frozen=True, repr=False)
class ReportResult(Result):
    """What a run did to each expert.

    Attributes:
        figures: see :func:`epmq_gptq.publish.page.report_figures`.
        out: file of the page, None where none was written.
    """

    figures: dict[str, Any]
    out: Path | None = None

    @property
    def page(self) -> str:
        """The page: one HTML document that needs no network."""
        from ..publish.page.render import page_of

        return page_of(self.figures)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.figures)

    def print_to(self, console: Console) -> None:
        from ..publish.page.table import expert_table

        console.print(expert_table(self.figures))

    def show(self, reporter: Reporter) -> None:
        self.print_to(reporter.result)
        if self.out is not None:
            reporter.step("page", str(self.out))

    def __repr__(self) -> str:
        run = self.figures["run"]
        return f"<ReportResult {run['checkpoint']}: {len(self.figures['experts'])} experts>"


def _of_a_shell(values: dict[str, Any], run: Run) -> None:
    """A shell wants a page unless it asks for JSON, and not even an error goes over an input."""
    from ..publish.page.sources import check_no_input, is_input
    from ..run_report import PAGE_NAME

    inputs = [values[name] for name in ("folder", "baseline", "evaluation") if values[name]]
    if run.file is not None and is_input(run.file, inputs):
        file = run.file
        run.keep()
        check_no_input(file, "--json", inputs)
    if values["out"] is None and run.file is None:
        values["out"] = values["folder"] / PAGE_NAME


@operation(
    ("a page in the checkpoint's folder", "epmq-gptq report merged-4bit"),
    (
        "beside plain GPTQ of the same merge",
        "epmq-gptq report merged-4bit --baseline plain-4bit --out report.html",
    ),
    ("the figures alone", "epmq-gptq report merged-4bit --json - | jq .experts"),
    interrupted="no report was written.",
    completed=_of_a_shell,
)
def report(
    folder: Annotated[
        str | Path, typer.Argument(metavar="DIR", help="The quantized checkpoint."), forms.PATH
    ],
    *,
    out: Annotated[
        str | Path | None,
        typer.Option("--out", help="File of the page, .html."),
        forms.PAGE,
    ] = None,
    baseline: Annotated[
        str | Path | None,
        typer.Option(help="Checkpoint of the same merge under plain GPTQ (profile: gptq)."),
        forms.PATH,
    ] = None,
    evaluation: Annotated[
        str | Path | None,
        typer.Option(
            help="File of `epmq-gptq retention`. Default epmq_evaluation.json of DIR, if there."
        ),
        forms.PATH,
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    reporter: Reporter,
) -> ReportResult:
    """Show what a run did to each expert, module by module: one HTML file that needs no network.

    Raises:
        EPMQInputError: there is no report, what was given belongs to another model, or a file of
            that name is there.
    """
    from ..publish.page.figures import report_figures
    from ..publish.page.sources import Sources, check_page

    if out is None and open_page:
        from ..io.declared import conflict

        raise conflict(
            "--open",
            "needs a page, and with `--json` alone none is made",
            "Say with `--out` where the page goes.",
        )
    sources = Sources.read(folder, baseline, evaluation)
    if out is not None:
        inputs = [each for each in (folder, baseline, evaluation) if each is not None]
        check_page(out, inputs, overwrite)
    figures = report_figures(sources.run, sources.baseline, sources.retention)
    result = ReportResult(figures, out)
    for note in sources.notes():
        reporter.note(note)
    if out is not None:
        from ..io.output import write_whole

        write_whole(out, result.page)
        if open_page:
            typer.launch(out.resolve().as_uri())
    return result
