"""``requantize``: a merge anew, from statistics that a run kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter
from . import forms
from .operation import Result, operation
from .quantize import say_checkpoint

if TYPE_CHECKING:
    from ..run_report import QuantizationReport


@dataclass(frozen=True, repr=False)
class RequantizeResult(Result):
    """A checkpoint that was made from recorded statistics.

    Attributes:
        out: its folder.
        report: module by module.
        full: whether the table has a line for every layer, however many.
    """

    out: Path
    report: "QuantizationReport"
    full: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"checkpoint": self.out.name, "report": self.report.to_dict()}

    def print_to(self, console: Console) -> None:
        from .summary import print_summary

        print_summary(console, self.report, {}, full=self.full)

    def show(self, reporter: Reporter) -> None:
        self.print_to(reporter.out)
        say_checkpoint(reporter, self.out)

    def __repr__(self) -> str:
        return f"<RequantizeResult {self.out.name}: {len(self.report.modules)} modules>"


@operation(
    (
        "8 bits in place of 4",
        "epmq-gptq requantize --from-statistics merged-4bit --merged ./merged \\\n"
        "    --set bits=8 --out merged-8bit",
    ),
    (
        "without one of the experts, and with a stronger anchor",
        "epmq-gptq requantize --from-statistics merged-4bit --merged ./merged \\\n"
        "    --leave-out code --set alpha=1 --out without-code",
    ),
)
def requantize(
    statistics: Annotated[
        str | Path,
        typer.Option(
            "--from-statistics",
            help="What `save_statistics: true` kept: its folder, or the checkpoint.",
        ),
        forms.PATH,
    ],
    *,
    out: Annotated[str | Path, forms.OUT, forms.PATH],
    merged: Annotated[
        str | Path | None,
        typer.Option(
            help="The merged model: folder or hub id; may be left out where the statistics are of "
            "one on the hub."
        ),
        forms.SOURCE,
    ] = None,
    leave_out: Annotated[
        Sequence[str], typer.Option(help="Experts that shall not count."), forms.NAMES
    ] = (),
    settings: Annotated[
        Mapping[str, Any] | None,
        typer.Option(
            "--set",
            help="In place of what was recorded: alpha, alpha_pattern, bits, group_size, "
            "expert_weights, weighting, dynamic, …",
            autocompletion=forms.settings,
        ),
        forms.VALUES,
    ] = None,
    overwrite: Annotated[bool, forms.OVERWRITE] = False,
    device: Annotated[str | None, forms.DEVICE] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="That weights are computed in; default: as recorded."),
        forms.DTYPE,
    ] = None,
    full: Annotated[bool, forms.FULL] = False,
    reporter: Reporter,
) -> RequantizeResult:
    """Quantize a merge anew from statistics that a run kept: no rows, no forward pass.

    With other bits, alphas or weights, or without one of the experts.

    Raises:
        EPMQInputError: an option cannot be changed, or merge and statistics do not belong together.
        EPMQNumericalError: numbers that cannot be trusted; nothing was written.
    """
    from ..host.recorded.run import requantize_folder

    report = requantize_folder(
        statistics,
        out,
        reporter,
        merged=merged,
        leave_out=leave_out,
        settings=settings,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    return RequantizeResult(out, report, full)
