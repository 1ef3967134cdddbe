"""What a preflight found: findings with a code each, and the tables behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import EPMQError, EPMQInputError

LEVELS = ("error", "warning", "note")
# How many findings of one kind an error spells out.
LISTED = 20


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know before any compute.

    Attributes:
        level: ``"error"`` (the run cannot start), ``"warning"`` or ``"note"``.
        code: one of :data:`epmq_gptq.errors.CODES`.
        subject: the object in a few words: an expert, a tensor, an option.
        cause: what was found; ends with a full stop.
        remedy: what to do about it; "" where nothing needs to be done.
    """

    level: str
    code: str
    subject: str
    cause: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level
        # A tensor's name is a stranger's text: the same cleaning as an error's.
        clean = EPMQInputError(
            self.cause, code=self.code, subject=self.subject, remedy=self.remedy
        ).to_dict()
        for part in ("cause", "subject", "remedy"):
            object.__setattr__(self, part, clean[part])

    @classmethod
    def from_error(cls, error: EPMQError, *, subject: str = "", level: str = "error") -> Finding:
        """What an exception says, about ``subject`` where that says more than the exception's."""
        subject = subject or error.subject
        return cls(level, error.code, subject, error.cause, error.remedy)

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


@dataclass
class Preflight:
    """Everything that was found, and the numbers that were computed on the way.

    Attributes:
        findings: errors first, then warnings, then notes.
        models: model → what its headers say (tensors, dtypes, bytes, what does not fit).
        similarity: distances and cosines of task vectors; {} where no weight was read.
        finite: counts of NaN, infinite and large values; {} unless ``verify="full"``.
        coverage: calibration tokens against the widths of the layers.
        estimates: disk, memory and time, as estimates.
        serving: engine → whether it can serve the export that was asked for.
        verify: how deep the check went: ``"headers"``, ``"sample"`` or ``"full"``.
        bytes_read: bytes of weights that were read, headers left out.
        seconds: wall time.
    """

    findings: list[Finding] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    similarity: dict[str, Any] = field(default_factory=dict)
    finite: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    estimates: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    verify: str = "sample"
    bytes_read: int = 0
    seconds: float = 0.0

    def add(self, findings: Iterable[Finding]) -> None:
        """Take more findings, each once, worst first, otherwise in the order in which they came."""
        known = dict.fromkeys((*self.findings, *findings))
        self.findings = sorted(known, key=lambda finding: LEVELS.index(finding.level))

    @property
    def errors(self) -> list[Finding]:
        """What a run would be refused for."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What a run would go on with, and a user should know."""
        return [finding for finding in self.findings if finding.level == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return asdict(self)

    def raise_errors(self) -> None:
        """Raise the first kind of error: all errors of one subject and code in one message.

        Raises:
            EPMQInputError: at most 20 causes are spelt out, with a count of the others.
        """
        if not self.errors:
            return
        first = self.errors[0]
        same = [e for e in self.errors if (e.code, e.subject) == (first.code, first.subject)]
        others = len(self.errors) - len(same)
        # The subject in front once, not before every cause.
        causes = [first.cause.rstrip(".")]
        causes += [
            error.cause.removeprefix(f"{first.subject}: ").rstrip(".") for error in same[1:LISTED]
        ]
        if len(same) > LISTED:
            causes.append(f"and {len(same) - LISTED} more")
        cause = "; ".join(causes) + "."
        if others:
            cause += f" {counted(others, 'other error')} besides; `epmq-gptq inspect` shows them."
        raise EPMQInputError(cause, code=first.code, subject=first.subject, remedy=first.remedy)


def counted(count: int, what: str) -> str:
    """``1 tensor``, ``1,200 tensors``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def listed(items: Iterable[str], limit: int = LISTED) -> str:
    """At most ``limit`` items in backticks, and how many more there are."""
    items = list(items)
    text = ", ".join(f"`{item}`" for item in items[:limit])
    return text + (f" and {len(items) - limit} more" if len(items) > limit else "")
