"""The report of a finished run, read from its checkpoint's folder and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import EPMQInputError
from ...io.folders import list_folder, read_json
from ...io.json_values import JsonValues
from .retention import Retention

FILE_NAME = "epmq_report.json"
SCHEMA = 1

# 200 layers of 7 modules and 20 experts make about 12 MB.
_MAX_BYTES = 500_000_000
_AGAIN = "Quantize and save again with this version of epmq_gptq, or restore the file."


@dataclass(frozen=True)
class AimFigures:
    """Deviations from what a layer aims at, relative to that aim's energy Σ‖T_i‖²; see `figures`.

    Attributes:
        merged, solved, rounded: of the merged weight, the unrounded target and the rounded one.
    """

    merged: float | None
    solved: float | None
    rounded: float | None


@dataclass(frozen=True)
class ExpertFigures:
    """One module's output on one expert's rows, relative to that expert's output energy.

    Attributes:
        rows: calibration rows that the figures are from.
        energy: mean of ‖W_i x‖² over them.
        merged: Σ‖(W_m − W_i) x‖² / Σ‖W_i x‖², the merging part of eq. 9.
        quantization: Σ‖(Q − W_m) x‖² / Σ‖W_i x‖², its rounding part.
        solved: Σ‖(W* − W_i) x‖² / Σ‖W_i x‖², the target before rounding.
        rounded: Σ‖(Q − W_i) x‖² / Σ‖W_i x‖², what is left in the end.
        aim: the same against the layer's aim, None where that is W_i x itself.
    """

    rows: int
    energy: float
    merged: float | None
    quantization: float | None
    solved: float | None
    rounded: float | None
    aim: AimFigures | None = None


@dataclass(frozen=True)
class ModuleFigures:
    """One module of a run; the fields of :class:`epmq_gptq.ModuleReport` that are shown.

    Attributes:
        experts: expert → its figures; {} where none were measured.
    """

    module: str
    target: str
    reason: str
    bits: int
    group_size: int
    alpha: float | None
    eta: float
    rho: float
    held_out_gain: float | None
    seconds: float
    tokens: dict[str, int]
    weights: dict[str, float]
    experts: dict[str, ExpertFigures]


@dataclass(frozen=True)
class RunReport:
    """A run as its :data:`FILE_NAME` tells it.

    Attributes:
        name: of the checkpoint's folder.
        version: of the epmq_gptq that wrote it.
        experts: names, in the order of the run.
        modules: in forward order.
        rows, tokens: calibration rows and tokens per expert.
        seconds: wall time.
        phases: phase → seconds.
        phase_memory: phase → bytes; {} in reports of an older version.
        peak_memory: where → bytes.
        left: experts that were not run to the end → why.
        provenance: what is published with the checkpoint; as it was read, unchecked.
    """

    name: str
    version: str
    experts: tuple[str, ...]
    modules: tuple[ModuleFigures, ...]
    rows: dict[str, int]
    tokens: dict[str, int]
    seconds: float
    phases: dict[str, float]
    phase_memory: dict[str, int]
    peak_memory: dict[str, int]
    left: dict[str, str]
    provenance: dict[str, Any]

    @property
    def is_measured(self) -> bool:
        """Whether any module has figures per expert."""
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


def read_report(folder: str | Path) -> RunReport:
    """The report of the run that made a checkpoint.

    Args:
        folder: of the checkpoint.

    Raises:
        EPMQInputError: there is no report, it is of another version, or something in it is not as
            it should be; names the file and the key.
    """
    folder = Path(folder)
    what = f"`{folder.name}`"
    if FILE_NAME not in list_folder(folder, what):
        raise EPMQInputError(
            f"{what} has no `{FILE_NAME}`, so nothing is known of its run.",
            code="EPMQ-F15",
            subject=f"`{FILE_NAME}`",
            remedy="Give a folder that `save` of this version of epmq_gptq wrote; one of an older "
            "version must be made anew.",
        )
    content = read_json(folder, FILE_NAME, what, max_bytes=_MAX_BYTES)
    values = JsonValues(content, file=FILE_NAME, remedy=_AGAIN)
    if content.get("schema") != SCHEMA or isinstance(content.get("schema"), bool):
        raise values.refusal("schema", str(SCHEMA), content.get("schema"))
    return _run(values.inside("report"), folder.resolve().name, values.text("epmq_gptq"))


def _run(values: JsonValues, name: str, version: str) -> RunReport:
    modules = tuple(_module(module) for module in values.each("modules"))
    if not modules:
        raise values.refusal("modules", "a list of at least one module", [])
    seen: set[str] = set()
    for module in modules:
        if module.module in seen:
            raise values.refusal("modules", "a list that names each module once", module.module)
        seen.add(module.module)
    tokens = values.counts("tokens")
    experts = dict.fromkeys(tokens)
    for module in modules:
        experts.update(dict.fromkeys((*module.tokens, *module.experts)))
    left = values.inside("left", needed=False)
    return RunReport(
        name=name,
        version=version,
        experts=tuple(experts),
        modules=modules,
        rows=values.counts("rows"),
        tokens=tokens,
        seconds=values.number("seconds", least=0),
        phases=values.numbers("phases"),
        phase_memory=values.counts("phase_memory"),
        peak_memory=values.counts("peak_memory"),
        left={expert: left.text(expert) for expert in left.values},
        provenance=dict(values.inside("provenance", needed=False).values),
    )


def _module(values: JsonValues) -> ModuleFigures:
    experts = values.inside("experts", needed=False)
    return ModuleFigures(
        module=values.text("module"),
        target=values.text("target"),
        reason=values.text("reason", ""),
        bits=values.count("bits"),
        group_size=values.integer("group_size"),
        alpha=values.number_or_none("alpha"),
        eta=values.number_or_none("eta") or 0.0,
        rho=values.number_or_none("rho") or 0.0,
        held_out_gain=values.number_or_none("held_out_gain"),
        seconds=values.number_or_none("seconds") or 0.0,
        tokens=values.counts("tokens"),
        weights=values.numbers("weights"),
        experts={name: _expert(experts.inside(name)) for name in experts.values},
    )


def _expert(values: JsonValues) -> ExpertFigures:
    aim = None
    if values.values.get("aim") is not None:
        inside = values.inside("aim")
        aim = AimFigures(*(_ratio(inside, key) for key in ("merged", "solved", "rounded")))
    return ExpertFigures(
        rows=values.count("rows"),
        energy=values.number("energy", least=0),
        merged=_ratio(values, "merged"),
        quantization=_ratio(values, "quantization"),
        solved=_ratio(values, "solved"),
        rounded=_ratio(values, "rounded"),
        aim=aim,
    )


def _ratio(values: JsonValues, key: str) -> float | None:
    return values.number_or_none(key, least=0)


def check_baseline(report: RunReport, baseline: RunReport) -> None:
    """Refuse a baseline whose figures are not those of the same merge and experts.

    Raises:
        EPMQInputError: other modules, other experts, another merged model, no plain GPTQ, or no
            figures.
    """

    def refusal(what: str) -> EPMQInputError:
        return EPMQInputError(
            f"`--baseline`: `{baseline.name}` {what}.",
            code="EPMQ-F54",
            subject="`--baseline`",
            remedy="Give a run on the same merge and experts, made with `profile: gptq`.",
        )

    ours = {module.module for module in report.modules}
    theirs = {module.module for module in baseline.modules}
    if ours != theirs:
        owner, odd = min(
            (run.name, name)
            for run, names in ((report, ours - theirs), (baseline, theirs - ours))
            for name in names
        )
        raise refusal(f"has other modules than `{report.name}`: `{odd}` is in `{owner}` alone")
    if set(report.experts) != set(baseline.experts):
        raise refusal(
            f"has the experts {', '.join(baseline.experts)}, `{report.name}` has "
            f"{', '.join(report.experts)}"
        )
    digests = [run.fact("merged", "sha256") for run in (report, baseline)]
    if None not in digests and digests[0] != digests[1]:
        raise refusal(f"was made from another merged model than `{report.name}`")
    # Its figures are shown as those of plain GPTQ, which they should be.
    profile = baseline.fact("profile")
    if profile not in (None, "gptq"):
        raise refusal(f"was made with `profile: {profile}`")
    if not baseline.is_measured:
        raise refusal("has no figures per expert")


def check_retention(report: RunReport, retention: Retention) -> None:
    """Refuse evaluations of experts that the run does not know.

    Raises:
        EPMQInputError: naming the first.
    """
    for name in retention.experts:
        if name not in report.experts:
            raise EPMQInputError(
                f"`--evaluation`: `{report.name}` has no expert `{name}`; it has "
                f"{', '.join(report.experts)}.",
                code="EPMQ-F54",
                subject="`--evaluation`",
                remedy="Give the evaluation of this checkpoint.",
            )
