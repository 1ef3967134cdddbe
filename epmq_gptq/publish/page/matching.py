"""Whether a baseline and an evaluation belong to the run that they are shown beside."""

from __future__ import annotations

from ...errors import EPMQInputError
from ...run_report import QuantizationReport
from .retention import Retention


def check_baseline(report: QuantizationReport, baseline: QuantizationReport) -> None:
    """Refuse a baseline whose figures are not those of the same merge and experts.

    Raises:
        EPMQInputError: other modules, other experts, another merged model, no plain GPTQ, or no
            figures.
    """

    def refusal(what: str) -> EPMQInputError:
        return EPMQInputError(
            f"`--baseline`: `{baseline.checkpoint}` {what}.",
            code="EPMQ-F54",
            subject="`--baseline`",
            remedy="Give a run on the same merge and experts, made with `profile: gptq`.",
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
            raise EPMQInputError(
                f"`--evaluation`: `{report.checkpoint}` has no expert `{name}`; it has "
                f"{', '.join(report.experts)}.",
                code="EPMQ-F54",
                subject="`--evaluation`",
                remedy="Give the evaluation of this checkpoint.",
            )
