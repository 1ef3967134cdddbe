"""What a run did, module by module: the numbers behind the summary table and the provenance."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

# What a saved checkpoint keeps it in, and the version of that file.
REPORT_NAME = "epmq_report.json"
PAGE_NAME = "epmq_report.html"  # the same for people
REPORT_SCHEMA = 1


@dataclass
class ExpertError:
    """How far one layer's outputs lie from one expert's, on a sample of that expert's rows.

    All but ``rows`` and ``energy`` are shares: Σ‖(W − W_i) x‖² / Σ‖W_i x‖², x being the inputs that
    the rows produce in the partially quantized merged model (eq. 9).

    Attributes:
        rows: that the figures are from; see ``EPMQConfig.regret_rows``.
        energy: mean of ‖W_i x‖² over them, by the outputs that are looked at.
        merged: of the merged weight: the merging deviation.
        solved: of the target, not rounded.
        rounded: of the rounded weight; None where rounding failed.
        quantization: Σ‖(Q − W_m) x‖², the quantization deviation, over the same energy.
        aim: ``merged``, ``solved`` and ``rounded`` against what the layer is rounded towards, T_i,
            over Σ‖T_i − b_m‖²; None where T_i is W_i x.
    """

    rows: int
    energy: float
    merged: float
    solved: float
    rounded: float | None = None
    quantization: float | None = None
    aim: dict[str, float] | None = None


@dataclass
class ModuleReport:
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
    """

    module: str
    target: str
    bits: int
    group_size: int
    alpha: float | None
    lam: float
    tokens: dict[str, int]
    loss: float | None
    excess: float | None
    merge_excess: float
    seconds: float
    reason: str = ""
    eta: float = 0.0
    rho: float = 0.0
    held_out: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    held_out_gain: float | None = None
    bias_shift: float | None = None
    experts: dict[str, ExpertError] = field(default_factory=dict)

    # The first and the last row of the rounded weight, (2, d) fp16, with which what a save wrote
    # is compared. No part of the report, so that it is not written.
    rounded: ClassVar[Any] = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModuleReport:
        """The inverse of ``dataclasses.asdict``."""
        experts = {name: ExpertError(**one) for name, one in values["experts"].items()}
        return cls(**values | {"experts": experts})


@dataclass
class QuantizationReport:
    """What a run did.

    Attributes:
        modules: one entry per quantized linear layer, in forward order.
        rows, tokens: calibration rows (of joined ones: blocks) and tokens per expert.
        calibration: expert → what became of its rows: asked for, available, used, cut, dropped; the
            fields of :class:`~epmq_gptq.calibration.tokens.RowCounts`.
        seconds: wall time of `quantize`, preflight included; of all attempts.
        attempts: how many it took: 1, and one more each time that it went on from a checkpoint.
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
        provenance: what is published in ``quantize_config.json`` under ``meta.epmq``.
    """

    modules: list[ModuleReport] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    shared_groups: int = 0
    shared_layers: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    phase_memory: dict[str, int] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    preflight: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

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
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Leave everything in a checkpoint's folder, for ``epmq-gptq report`` and the card."""
        from . import __version__

        record = {"schema": REPORT_SCHEMA, "epmq_gptq": __version__, "report": self.to_dict()}
        text = json.dumps(record, indent=1, default=str)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
