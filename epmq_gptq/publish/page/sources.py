"""What a report is made from: a run, and if there are, a baseline and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import EPMQInputError
from ...run_report import REPORT_NAME, QuantizationReport, read_report
from .figures import report_figures
from .retention import Retention, read_retention


@dataclass(frozen=True)
class Sources:
    """Everything that was read for one report.

    Attributes:
        run: that is reported.
        baseline, retention: None where there are none.
    """

    run: QuantizationReport
    baseline: QuantizationReport | None = None
    retention: Retention | None = None

    @classmethod
    def read(cls, folder: Path, baseline: Path | None, evaluation: Path | None) -> Sources:
        """Read them.

        Args:
            folder: of the checkpoint.
            baseline: folder of a run with plain GPTQ on the same merge.
            evaluation: file of ``epmq-gptq retention``; None for the one in ``folder``, if any.

        Raises:
            EPMQInputError: one of them is missing, or is not as it should be.
        """
        run = read_report(folder)
        other = None if baseline is None else read_report(baseline)
        if evaluation is None:
            return cls(run, other, read_retention(folder))
        kept = read_retention(evaluation.parent, evaluation.name)
        if kept is None:
            raise EPMQInputError(
                f"`--evaluation`: there is no file `{evaluation.name}`.",
                code="EPMQ-F15",
                subject="`--evaluation`",
                remedy="Make it with `epmq-gptq retention`.",
            )
        return cls(run, other, kept)

    def figures(self) -> dict[str, Any]:
        """See :func:`~epmq_gptq.publish.page.report_figures`."""
        return report_figures(self.run, self.baseline, self.retention)

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        notes = []
        if not self.run.is_measured:
            notes.append(
                "this run measured no figures per expert; the page has its modules and times"
            )
        if self.baseline is not None and _widths(self.baseline) != _widths(self.run):
            notes.append("the baseline has other bits or groups than this run")
        return notes


def _widths(run: QuantizationReport) -> set[tuple[int, int]]:
    return {(module.bits, module.group_size) for module in run.modules}


def check_page(target: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse a place for a page.

    Args:
        target: the file.
        inputs: files and folders of checkpoints that the report is made from.
        overwrite: whether a file may be replaced.

    Raises:
        EPMQInputError: it does not end in .html, its folder is not there, or it is there already.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise EPMQInputError(
            f"`--out` should be a file that ends in .html, got `{target.name}`.",
            code="EPMQ-O01",
            subject="`--out`",
            remedy="Name it so; the figures as JSON go to `--json`.",
        )
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise EPMQInputError(
            f"`--out`: `{target.name}` should be a file in a folder that exists.",
            code="EPMQ-F45",
            subject="`--out`",
            remedy="Choose another place.",
        )
    check_no_input(target, "--out", inputs)
    if target.exists() and not overwrite:
        raise EPMQInputError(
            f"`--out`: `{target.name}` exists.",
            code="EPMQ-F45",
            subject="`--out`",
            remedy="Choose another name or pass --overwrite.",
        )


def is_input(target: Path, inputs: list[Path]) -> bool:
    """Whether a file is one that the report is made from."""
    files = [place / REPORT_NAME if place.is_dir() else place for place in inputs]
    return any(file.exists() and target.exists() and target.samefile(file) for file in files)


def check_no_input(target: Path, option: str, inputs: list[Path]) -> None:
    """Refuse a file that the report is made from.

    Raises:
        EPMQInputError: naming the option.
    """
    if is_input(target, inputs):
        raise EPMQInputError(
            f"`{option}`: `{target.name}` is what the figures are read from.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another name.",
        )
