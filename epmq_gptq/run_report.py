"""What a run did, module by module: written by the host, read by everything that describes a run.

:class:`QuantizationReport` is what ``quantize`` returns and ``save`` leaves in the checkpoint's
folder as ``epmq_report.json``; :func:`read_report` reads it back.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from .errors import EPMQInputError
from .io.declared import input_error, is_whole, ruled
from .io.folders import list_folder, read_json

# What a saved checkpoint keeps it in, and the version of that file.
REPORT_NAME = "epmq_report.json"
PAGE_NAME = "epmq_report.html"  # the same for people
REPORT_SCHEMA = 1
# 200 layers of 7 modules and 20 experts make about 12 MB.
MAX_REPORT_BYTES = 500_000_000

_AGAIN = "Quantize and save again with this version of epmq_gptq, or restore the file."
_FROM_FILE = {"file": REPORT_NAME}


def _in_file(words: str, least: float, most: float) -> AfterValidator:
    """A rule for numbers that come from a file; what a run itself computes is taken as it is."""

    def check(value: float, info: ValidationInfo) -> float:
        if info.context is _FROM_FILE and not least <= value <= most:
            raise PydanticCustomError("number", "Input should be {words}", {"words": words})
        return value

    return AfterValidator(check)


_LARGEST = sys.float_info.max
Finite = Annotated[float, _in_file("a finite number", -_LARGEST, _LARGEST)]
NotNegative = Annotated[float, _in_file("a finite number, 0 or more", 0.0, _LARGEST)]
Count = Annotated[int, _in_file("a whole number, 0 or more", 0, 2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AimError(_Part):
    """How far a layer's outputs lie from what it is rounded towards, T_i, over Σ‖T_i − b_m‖².

    Attributes:
        merged, solved, rounded: of the merged weight, the target before rounding, and after.
    """

    merged: NotNegative
    solved: NotNegative
    rounded: NotNegative | None = None


class ExpertError(_Part):
    """How far one layer's outputs lie from one expert's, on a sample of that expert's rows.

    All but ``rows`` and ``energy`` are shares: Σ‖(W − W_i) x‖² / Σ‖W_i x‖², x being the inputs that
    the rows produce in the partially quantized merged model (eq. 9).

    Attributes:
        rows: that the figures are from; see ``EPMQConfig.regret_rows``.
        energy: mean of ‖W_i x‖² over them, by the outputs that are looked at.
        merged: of the merged weight: the merging part of eq. 9.
        solved: of the target, not rounded.
        rounded: of the rounded weight; None where rounding failed.
        quantization: Σ‖(Q − W_m) x‖² over the same energy: the rounding part of eq. 9.
        aim: the errors against T_i; None where T_i is W_i x itself.
    """

    rows: Count
    energy: NotNegative
    merged: NotNegative
    solved: NotNegative
    rounded: NotNegative | None = None
    quantization: NotNegative | None = None
    aim: AimError | None = None


class ModuleReport(_Part):
    """What happened to one linear layer.

    Attributes:
        module: full name.
        target: ``"experts"`` (W*), ``"merged"`` (a routed module with too few tokens, or a layer
            for which nothing was better on the held-out rows, keeps W_m as its target; all layers
            with ``alpha="gptq"``) or ``"rtn"`` (rounded to nearest by ``on_bad_module="rtn"``).
        bits, group_size: of its codes.
        alpha, lam: the anchor, λ = alpha · tr(H) / d (eq. 13); no alpha where, with
            ``alpha="auto"``, no target was better than the merged weight.
        tokens: calibration tokens that reached it, per expert.
        loss: the host's loss: excess of eq. 12 per token, squared (None for RTN).
        excess: eq. 12 of the rounded weight minus its unquantized optimum (None for RTN).
        merge_excess: the same of the unrounded merged weight: what merging alone costs here.
        seconds: solving and rounding.
        reason: why ``target`` is not ``"experts"``.
        eta, rho: the shares of the expert's own inputs and of the gap between the residual
            streams in the target; 0 where the layer has none.
        held_out: of ``alpha="auto"``: alpha → by how much the error on the held-out rows falls
            below that of the merged weight, over the layers of this input; without those that fp32
            cannot solve.
        weights: of ``weighting="minmax"``: what each expert counts in this layer.
        held_out_gain: by how much that error falls with the rounded weight; below 0 it rises.
        bias_shift: norm of what was added to the bias, None where it stays.
        experts: how far its outputs lie from each expert's; empty where that was not looked at.
        rounded: the first and the last row of the rounded weight, (2, d) fp16, with which what a
            save wrote is compared; in memory only.
    """

    module: str
    target: str
    bits: Count
    group_size: int
    alpha: Finite | None
    lam: float
    tokens: dict[str, Count]
    loss: float | None
    excess: float | None
    merge_excess: float
    seconds: Finite
    reason: str = ""
    eta: Finite = 0.0
    rho: Finite = 0.0
    held_out: dict[str, float] = {}
    weights: dict[str, Finite] = {}
    held_out_gain: Finite | None = None
    bias_shift: float | None = None
    experts: dict[str, ExpertError] = {}
    rounded: Any = Field(None, exclude=True, repr=False)


class QuantizationReport(_Part):
    """What a run did.

    Attributes:
        modules: one entry per quantized linear layer, in forward order.
        rows, tokens: calibration rows (of joined ones: blocks) and tokens per expert.
        calibration: expert → what became of its rows: asked for, available, used, cut, dropped; the
            fields of :class:`~epmq_gptq.calibration.encoded.RowCounts`.
        seconds: wall time of `quantize`, preflight included; of all attempts.
        attempts: how many it took: 1, and one more each time that it went on from a resume state.
        shared_groups: inputs whose one Gram and one factor served several layers.
        shared_layers: layers that used another layer's Gram.
        phases: phase → seconds, see :data:`~epmq_gptq.io.phases.PHASES`; work of several threads at
            once counts for each of them.
        phase_memory: phase → the most bytes held at an end of it, by the process or on the GPU; not
            of phases that are the host's alone.
        peak_memory: bytes at the peak of the process, and of the GPU where there is one.
        left: experts whose own pass ended early, and why (``on_bad_module="rtn"``): from there on
            their targets are the paper's.
        preflight: what was found before the run, see :class:`~epmq_gptq.checks.Preflight`.
        provenance: what is published in ``quantize_config.json`` under ``meta.epmq``; of a report
            that was read, whatever the file says.
        checkpoint: name of the folder that the report was read from; not in the file.
        version: of the epmq_gptq that wrote the file; not in the report itself.
    """

    modules: list[ModuleReport] = []
    rows: dict[str, Count] = {}
    tokens: dict[str, Count] = {}
    calibration: dict[str, dict[str, Any]] = {}
    seconds: NotNegative = 0.0
    attempts: Count = 1
    shared_groups: Count = 0
    shared_layers: Count = 0
    phases: dict[str, Finite] = {}
    phase_memory: dict[str, Count] = {}
    peak_memory: dict[str, Count] = {}
    left: dict[str, str] = {}
    preflight: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    checkpoint: str = Field("", exclude=True)
    version: str = Field("", exclude=True)

    @property
    def excess(self) -> float:
        """Σ over layers of eq. 12 above its optimum, after rounding (RTN layers left out)."""
        return sum(m.excess for m in self.modules if m.excess is not None)

    @property
    def merge_excess(self) -> float:
        """The same of the unrounded merge: what was lost before any rounding."""
        return sum(m.merge_excess for m in self.modules)

    @property
    def exceptions(self) -> list[ModuleReport]:
        """The layers that did not get what was asked for, and why."""
        return [m for m in self.modules if m.target != "experts" and m.reason]

    @property
    def experts(self) -> list[str]:
        """Names of the experts, in the order of the run."""
        names = dict.fromkeys(self.tokens)
        for module in self.modules:
            names.update(dict.fromkeys((*module.tokens, *module.experts)))
        return list(names)

    @property
    def is_measured(self) -> bool:
        """Whether any module has errors per expert."""
        return any(module.experts for module in self.modules)

    def fact(self, *path: str) -> Any:
        """The value under these keys of the provenance, None where there is none."""
        value: Any = self.provenance
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def about_expert(self, name: str) -> Mapping[str, Any]:
        """What the provenance says of one expert, {} where it does not know it."""
        known = self.fact("experts")
        for one in known if isinstance(known, list) else []:
            if isinstance(one, Mapping) and one.get("name") == name:
                return one
        return {}

    def profile(self) -> dict[str, Any]:
        """Seconds by phase and bytes at the peak, and what they depend on."""
        return {
            "seconds": self.seconds,
            "phases": dict(self.phases),
            "phase_memory": dict(self.phase_memory),
            "peak_memory": dict(self.peak_memory),
            "experts": len(self.tokens),
            "tokens": sum(self.tokens.values()),
            "modules": len(self.modules),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return self.model_dump()

    def write(self, folder: Path) -> None:
        """Leave everything in a checkpoint's folder, for ``epmq-gptq report`` and the card."""
        from . import __version__

        record = {"schema": REPORT_SCHEMA, "epmq_gptq": __version__, "report": self.to_dict()}
        text = json.dumps(record, indent=1, default=str)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


class _ReportFile(_Part):
    """The content of ``epmq_report.json``."""

    file_schema: Annotated[
        int, ruled(str(REPORT_SCHEMA), lambda got: got == REPORT_SCHEMA and is_whole(got))
    ] = Field(alias="schema")
    epmq_gptq: str
    report: QuantizationReport


def read_report(folder: str | Path) -> QuantizationReport:
    """The report of the run that made a checkpoint.

    Args:
        folder: of the checkpoint.

    Raises:
        EPMQInputError: there is no report, it is of another version, or something in it is not as
            it should be; names the file and the key.
    """
    folder = Path(folder)
    what = f"`{folder.name}`"
    if REPORT_NAME not in list_folder(folder, what):
        raise EPMQInputError(
            f"{what} has no `{REPORT_NAME}`, so nothing is known of its run.",
            code="EPMQ-F15",
            subject=f"`{REPORT_NAME}`",
            remedy="Give a folder that `save` of this version of epmq_gptq wrote; one of an older "
            "version must be made anew.",
        )
    content = read_json(folder, REPORT_NAME, what, max_bytes=MAX_REPORT_BYTES)
    try:
        read = _ReportFile.model_validate(content, strict=True, context=_FROM_FILE)
    except ValidationError as error:
        file = f"`{REPORT_NAME}`"
        raise input_error(
            _ReportFile, error, file, content, code="EPMQ-F53", remedy=_AGAIN
        ) from error
    report = read.report
    _check_modules(report)
    report.checkpoint, report.version = folder.resolve().name, read.epmq_gptq
    return report


def _check_modules(report: QuantizationReport) -> None:
    names = Counter(module.module for module in report.modules)
    twice = next((name for name, count in names.items() if count > 1), None)
    if names and twice is None:
        return
    rule = "name each module once" if names else "name at least one module"
    got = f", got `{twice}` twice" if names else ""
    raise EPMQInputError(
        f"`{REPORT_NAME}`: `report.modules` should {rule}{got}.",
        code="EPMQ-F53",
        subject=f"`{REPORT_NAME}`",
        remedy=_AGAIN,
    )
