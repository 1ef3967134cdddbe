"""What a report is made from: a run, and if there are, a baseline and evaluations.

All of them must be of the same merge and experts, and the page goes over none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import EPMQInputError
from ...run_report import REPORT_NAME, QuantizationReport, read_report
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
            raise _refused(
                "--evaluation",
                f": there is no file `{evaluation.name}`.",
                "Make it with `epmq-gptq retention`.",
                code="EPMQ-F15",
            )
        return cls(run, other, kept)

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
    """Refuse a path for a page.

    Args:
        target: the file.
        inputs: files and folders of checkpoints that the report is made from.
        overwrite: whether a file may be replaced.

    Raises:
        EPMQInputError: it does not end in .html, its folder is not there, or it is there already.
    """
    name = target.name
    if target.suffix.lower() not in (".html", ".htm"):
        raise _refused(
            "--out",
            f" should be a file that ends in .html, got `{name}`.",
            "Name it so; the figures as JSON go to `--json`.",
            code="EPMQ-O01",
        )
    if target.is_dir() or not target.absolute().parent.is_dir():
        cause = f": `{name}` should be a file in a folder that exists."
        raise _refused("--out", cause, "Choose another place.")
    check_no_input(target, "--out", inputs)
    if target.exists() and not overwrite:
        raise _refused("--out", f": `{name}` exists.", "Choose another name or pass --overwrite.")


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
        cause = f": `{target.name}` is what the figures are read from."
        raise _refused(option, cause, "Choose another name.")


def _refused(option: str, cause: str, remedy: str, code: str = "EPMQ-F45") -> EPMQInputError:
    return EPMQInputError(f"`{option}`{cause}", code=code, subject=f"`{option}`", remedy=remedy)


# ---- whether they belong together ----------------------------------------------------------------


def check_baseline(report: QuantizationReport, baseline: QuantizationReport) -> None:
    """Refuse a baseline whose figures are not those of the same merge and experts.

    Raises:
        EPMQInputError: other modules, other experts, another merged model, no plain GPTQ, or no
            figures.
    """

    def refusal(what: str) -> EPMQInputError:
        return _refused(
            "--baseline",
            f": `{baseline.checkpoint}` {what}.",
            "Give a run on the same merge and experts, made with `profile: gptq`.",
            code="EPMQ-F54",
        )

    ours = {module.module for module in report.modules}
    theirs = {module.module for module in baseline.modules}
    if ours != theirs:
        owner, odd = min(
            (run.checkpoint, name)
            for run, names in ((report, ours - theirs), (baseline, theirs - ours))
            for name in names
        )
        raise refusal(
            f"has other modules than `{report.checkpoint}`: `{odd}` is in `{owner}` alone"
        )
    if set(report.experts) != set(baseline.experts):
        raise refusal(
            f"has the experts {', '.join(baseline.experts)}, `{report.checkpoint}` has "
            f"{', '.join(report.experts)}"
        )
    digests = [run.fact("merged", "sha256") for run in (report, baseline)]
    if None not in digests and digests[0] != digests[1]:
        raise refusal(f"was made from another merged model than `{report.checkpoint}`")
    # Its figures are shown as those of plain GPTQ, which they should be.
    profile = baseline.fact("profile")
    if profile not in (None, "gptq"):
        raise refusal(f"was made with `profile: {profile}`")
    if not baseline.is_measured:
        raise refusal("has no figures per expert")


def check_retention(report: QuantizationReport, retention: Retention) -> None:
    """Refuse evaluations of experts that the run does not know.

    Raises:
        EPMQInputError: naming the first.
    """
    for name in retention.experts:
        if name not in report.experts:
            raise _refused(
                "--evaluation",
                f": `{report.checkpoint}` has no expert `{name}`; it has "
                f"{', '.join(report.experts)}.",
                "Give the evaluation of this checkpoint.",
                code="EPMQ-F54",
            )
