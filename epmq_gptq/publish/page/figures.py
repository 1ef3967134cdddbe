"""The figures of a run's report, summed up by layer, kind of module and expert; plain data.

All are shares of an expert's output energy. Those of several modules are the mean of theirs, each
counting by the output energy that the expert's calibration tokens have in it (mean energy per row
times tokens): Σ‖(Q − W_i) x‖² over the modules, divided by Σ‖W_i x‖² over them.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ...run_report import AimError, ExpertError, ModuleReport, QuantizationReport
from .layers import kind_of, layer_labels, layer_of, layers_in_order
from .retention import STAGES, Retention
from .sources import check_baseline, check_retention

SCHEMA = 1

# Figure → what it is, in the order in which they are shown. A figure that is not known (no
# baseline, no other aim than W_i x) is None.
FIGURES = {
    "merged": "before: the merged weight, eq. 9's merging part",
    "rounded": "after: the quantized weight",
    "change": "after - before",
    "gptq": "after plain GPTQ of the same merge (the baseline run)",
    "over_gptq": "after - after plain GPTQ",
    "quantization": "eq. 9's rounding part: quantized against merged weight",
    "cross": "after - merging part - rounding part: what the two have in common",
    "solved": "the target, before rounding",
    "aim_merged": "before, against what the layer aims at",
    "aim_rounded": "after, against what the layer aims at",
    "aim_change": "after - before, against what the layer aims at",
}
# What the document says of a module as its run told it.
_OF_MODULES = ("target", "reason", "bits", "group_size", "alpha", "eta", "rho", "held_out_gain")
# Pairs (module, expert) that the JSON document lists as the worst.
WORST = 20

Figures = dict[str, float | None]


class _Cell(NamedTuple):
    """One expert in one module: what it counts in a mean, and its figures."""

    weight: float
    figures: Figures


def figures_of(
    one: ExpertError, baseline: ExpertError | None = None, *, aims: bool = False
) -> Figures:
    """Every figure of :data:`FIGURES` for one expert in one module.

    Args:
        one: as the run told it.
        baseline: the same of the run with plain GPTQ.
        aims: whether layers of this run aim at something else than W_i x; one that does not has
            that as its aim.
    """
    aim = one.aim
    if aims and aim is None:
        aim = AimError(merged=one.merged, solved=one.solved, rounded=one.rounded)
    gptq = None if baseline is None else baseline.rounded
    return {
        "merged": one.merged,
        "rounded": one.rounded,
        "change": _minus(one.rounded, one.merged),
        "gptq": gptq,
        "over_gptq": _minus(one.rounded, gptq),
        "quantization": one.quantization,
        "cross": _minus(one.rounded, one.merged, one.quantization),
        "solved": one.solved,
        "aim_merged": None if aim is None else aim.merged,
        "aim_rounded": None if aim is None else aim.rounded,
        "aim_change": None if aim is None else _minus(aim.rounded, aim.merged),
    }


def _minus(value: float | None, *others: float | None) -> float | None:
    if value is None or None in others:
        return None
    return value - sum(others)


def judging_figure(figures: Iterable[Figures]) -> str:
    """By which figure a module of this run is bad: after, against what the layers aim at.

    Under the default targets a layer also makes good what earlier layers did to the stream. Then it
    is far from W_i x on purpose.
    """
    return "aim_rounded" if any(one["aim_rounded"] is not None for one in figures) else "rounded"


def mean_figures(cells: Iterable[tuple[float, Figures]]) -> Figures:
    """The mean of each figure, weighted; over those cells that have it, None where none has.

    Args:
        cells: (weight, figures).
    """
    cells = list(cells)
    means: Figures = {}
    for key in FIGURES:
        known = [(weight, found[key]) for weight, found in cells if found[key] is not None]
        total = sum(weight for weight, _ in known)
        means[key] = sum(weight * value for weight, value in known) / total if total > 0 else None
    return means


def report_figures(
    report: QuantizationReport,
    baseline: QuantizationReport | None = None,
    retention: Retention | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as plain data; fit for JSON.

    Args:
        report: of the run.
        baseline: of a run with plain GPTQ on the same merge.
        retention: evaluations of the experts and of the models that replace them.

    Raises:
        EPMQInputError: the baseline is that of another model, or the evaluation knows
            other experts.
    """
    from ... import __version__

    if baseline is not None:
        check_baseline(report, baseline)
    if retention is not None:
        check_retention(report, retention)
    cells = _cells(report, baseline)
    judge = judging_figure(cell.figures for found in cells for cell in found.values())
    layers = layers_in_order(module.module for module in report.modules)
    labels = layer_labels(layers)
    by_layer = _groups(report, cells, lambda module: layer_of(module.module))
    by_kind = _groups(report, cells, lambda module: kind_of(module.module))
    modules = _modules(report, cells, dict(zip(layers, labels, strict=True)))
    return {
        "schema": SCHEMA,
        "epmq_gptq": __version__,
        "figures": FIGURES,
        "judged_by": judge,
        "run": run_facts(report),
        "baseline": None if baseline is None else run_facts(baseline),
        "experts": [_expert(report, cells, name, retention, judge) for name in report.experts],
        "layers": [
            {
                "label": label,
                "stack": layer.stack,
                "index": layer.index,
                "modules": len(by_layer[layer].modules),
                "experts": by_layer[layer].experts,
            }
            for layer, label in zip(layers, labels, strict=True)
        ],
        "kinds": [
            {"kind": kind, "modules": len(group.modules), "experts": group.experts}
            for kind, group in by_kind.items()
        ],
        "modules": modules,
        "worst": _worst(modules, judge),
        "left": report.left,
        "phases": report.phases,
        "phase_memory": report.phase_memory,
        "peak_memory": report.peak_memory,
    }


def _cells(
    report: QuantizationReport, baseline: QuantizationReport | None
) -> list[dict[str, _Cell]]:
    """For each module: expert → cell."""
    aims = any(one.aim for module in report.modules for one in module.experts.values())
    others = {} if baseline is None else {one.module: one.experts for one in baseline.modules}
    return [
        {
            name: _Cell(
                one.energy * (module.tokens.get(name) or one.rows),
                figures_of(one, others.get(module.module, {}).get(name), aims=aims),
            )
            for name, one in module.experts.items()
        }
        for module in report.modules
    ]


class _Group(NamedTuple):
    """Some modules, and expert → the mean of its figures over them."""

    modules: list[int]
    experts: dict[str, Figures]


def _groups(
    report: QuantizationReport,
    cells: Sequence[dict[str, _Cell]],
    key: Callable[[ModuleReport], Any],
) -> dict[Any, _Group]:
    members: dict[Any, list[int]] = {}
    for number, module in enumerate(report.modules):
        members.setdefault(key(module), []).append(number)
    groups = {}
    for name, numbers in members.items():
        found = {
            expert: [cells[number][expert] for number in numbers if expert in cells[number]]
            for expert in report.experts
        }
        means = {expert: mean_figures(some) for expert, some in found.items() if some}
        groups[name] = _Group(numbers, means)
    return groups


def _modules(
    report: QuantizationReport, cells: Sequence[dict[str, _Cell]], labels: dict[Any, str]
) -> list[dict[str, Any]]:
    totals = {name: _deviation(cells, name) for name in report.experts}
    return [
        {
            "module": module.module,
            "layer": labels[layer_of(module.module)],
            "kind": kind_of(module.module),
            **{key: getattr(module, key) for key in _OF_MODULES},
            "seconds": module.seconds,
            "experts": {
                name: {
                    "tokens": module.tokens.get(name, 0),
                    "weight": _weight(report, module, name),
                    "rows": module.experts[name].rows,
                    "energy": module.experts[name].energy,
                    "share": _share(cell, totals[name]),
                    **cell.figures,
                }
                for name, cell in found.items()
            },
            # Also of experts without figures: how many tokens came here is why.
            "tokens": module.tokens,
        }
        for module, found in zip(report.modules, cells, strict=True)
    ]


def _deviation(cells: Sequence[dict[str, _Cell]], name: str) -> float:
    found = [cell[name] for cell in cells if name in cell]
    return sum(one.weight * one.figures["rounded"] for one in found if one.figures["rounded"])


def _share(cell: _Cell, total: float) -> float | None:
    """What part of the expert's deviation over all modules is in this one."""
    rounded = cell.figures["rounded"]
    return None if rounded is None or total <= 0 else cell.weight * rounded / total


def _weight(report: QuantizationReport, module: ModuleReport, name: str) -> float:
    """What an expert counts in a module: of the run where the module has none of its own."""
    if name in module.weights:
        return module.weights[name]
    weight = report.about_expert(name).get("weight", 1.0)
    return float(weight) if isinstance(weight, (int, float)) else 1.0


def _expert(
    report: QuantizationReport,
    cells: Sequence[dict[str, _Cell]],
    name: str,
    retention: Retention | None,
    judge: str,
) -> dict[str, Any]:
    own = [(number, found[name]) for number, found in enumerate(cells) if name in found]
    known = [(number, cell) for number, cell in own if cell.figures[judge] is not None]
    worst = max(known, key=lambda one: one[1].figures[judge], default=None)
    about = report.about_expert(name)
    return {
        "name": name,
        "source": _text(about.get("source")),
        "revision": _text(about.get("revision")),
        "rows": report.rows.get(name, 0),
        "tokens": report.tokens.get(name, 0),
        "weight": about.get("weight") if isinstance(about.get("weight"), (int, float)) else None,
        "modules": len(own),
        "figures": mean_figures(cell for _, cell in own),
        "median": statistics.median(cell.figures[judge] for _, cell in known) if known else None,
        "worst": worst
        and {
            "module": report.modules[worst[0]].module,
            "figure": worst[1].figures[judge],
        },
        "retention": _retention(retention, name),
    }


def _retention(retention: Retention | None, name: str) -> dict[str, Any] | None:
    found = None if retention is None else retention.experts.get(name)
    if found is None:
        return None
    return {
        "task": found.task,
        "metric": found.metric,
        "higher_is_better": found.higher_is_better,
        "values": {stage: getattr(found, stage) for stage in STAGES},
        "percent": {stage: found.percent(stage) for stage in STAGES},
    }


def _worst(modules: Sequence[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    found = [
        {"module": module["module"], "expert": name}
        | {key: one[key] for key in (*FIGURES, "share")}
        for module in modules
        for name, one in module["experts"].items()
        if one[judge] is not None
    ]
    return sorted(found, key=lambda one: -one[judge])[:WORST]


def run_facts(report: QuantizationReport) -> dict[str, Any]:
    """What was run: names, options, counts, versions."""
    versions = report.fact("versions")
    versions = versions if isinstance(versions, dict) else {}
    return {
        "checkpoint": report.checkpoint,
        "merged": _text(report.fact("merged", "source")),
        "base": _text(report.fact("base", "source")),
        "merge_method": _text(report.fact("merge", "method")),
        "method": _text(report.fact("method")),
        "profile": _text(report.fact("profile")),
        "anchor": _text(report.fact("anchor")),
        "alpha": report.fact("alpha"),
        "eta": report.fact("eta"),
        "rho": report.fact("rho"),
        "weighting": _text(report.fact("weighting")),
        "bits": sorted({module.bits for module in report.modules}),
        "group_size": sorted({module.group_size for module in report.modules}),
        "modules": len(report.modules),
        "targets": dict(Counter(module.target for module in report.modules)),
        "rows": sum(report.rows.values()),
        "tokens": sum(report.tokens.values()),
        "seconds": report.seconds,
        "versions": {"epmq_gptq": report.version}
        | {str(name): str(version) for name, version in versions.items()},
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
