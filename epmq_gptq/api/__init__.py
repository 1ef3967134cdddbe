"""The commands as functions, for notebooks and scripts: the same names, the same options.

    import epmq_gptq

    result = epmq_gptq.quantize(
        "./merged",
        out="merged-4bit",
        experts={"math": "./math-expert", "code": "./code-expert"},
        calibration={"math": math_rows, "code": "code.jsonl"},
        settings={"bits": 4, "group_size": 128},
        progress=True,
    )
    result            # in a notebook: its table
    result.to_dict()  # what `--json` writes

Every function raises an :class:`~epmq_gptq.errors.EPMQError` where its command would leave with a
code, warns with :class:`~epmq_gptq.errors.EPMQWarning`, never asks anything, and prints nothing
unless ``progress`` is True. A new one takes its arguments, works inside
:func:`~epmq_gptq.api.session.session` and
returns a subclass of :class:`Result`.
"""

from __future__ import annotations

from .afterwards import (
    CardResult,
    CheckResult,
    EvaluateResult,
    ExplainResult,
    PushResult,
    ReportResult,
    RetentionResult,
    card,
    check,
    evaluate,
    explain,
    push,
    report,
    retention,
)
from .making import (
    InspectResult,
    MergedModel,
    MergeMethods,
    QuantizeResult,
    RequantizeResult,
    inspect,
    merge,
    methods,
    quantize,
    requantize,
)
from .session import Result

__all__ = [
    "CardResult",
    "CheckResult",
    "EvaluateResult",
    "ExplainResult",
    "InspectResult",
    "MergeMethods",
    "MergedModel",
    "PushResult",
    "QuantizeResult",
    "ReportResult",
    "RequantizeResult",
    "Result",
    "RetentionResult",
    "card",
    "check",
    "evaluate",
    "explain",
    "inspect",
    "merge",
    "methods",
    "push",
    "quantize",
    "report",
    "requantize",
    "retention",
]
