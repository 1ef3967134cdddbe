"""The results of the speed benchmark as Markdown, and a chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cases import QUANTIZERS, Case

Runs = Mapping[Case, Mapping[str, Sequence[Mapping[str, Any]]]]
_PHASES = ("forward", "expert_forward", "expert_reading", "gram", "fold", "alpha", "solve")
_PHASES += ("round", "pack", "prepare", "waiting")


def ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]], of: str, to: str) -> list[float]:
    """Seconds of one quantizer over another's, round by round."""
    pairs = zip(runs.get(of, ()), runs.get(to, ()), strict=False)
    return [one["seconds"] / other["seconds"] for one, other in pairs]


def quantiles(values: Sequence[float]) -> str:
    """p20, p50, p80."""
    if not values:
        return " | | "
    return " | ".join(f"{value:.2f}" for value in np.percentile(values, (20, 50, 80)))


def ratio_table(runs: Runs) -> str:
    """Every case and quantizer against stock GPTQ, and against GPTQ with our Gram."""
    lines = [
        "| model | K | tokens | cache | quantizer | s (median) | to stock: p20 | p50 | p80 "
        "| to fast: p50 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in runs.items():
        # What is read cold is compared with the same case's warm runs of the others.
        beside = dict(runs.get(dataclasses.replace(case, cold=False), {})) | found
        for name, one in found.items():
            seconds = np.median([run["seconds"] for run in one])
            fast = ratios(beside, name, "fast")
            honest = f"{np.median(fast):.2f}" if fast and name != "fast" else ""
            lines.append(
                f"| {case.name} | {case.experts} | {case.tokens:,} "
                f"| {'cold' if case.cold else 'warm'} | {name} | {seconds:.1f} "
                f"| {quantiles(ratios(beside, name, 'gptq'))} | {honest} |"
            )
    return "\n".join(lines) + "\n"


def phase_table(runs: Runs) -> str:
    """Seconds by phase of our quantizers, medians."""
    lines = [
        "| model | K | tokens | quantizer | " + " | ".join(p.replace("_", " ") for p in _PHASES),
        "|---" * (4 + len(_PHASES)) + "|",
    ]
    lines[0] += " |"
    for case, found in runs.items():
        for name in ("fast", "paper", "best"):
            if case.cold or name not in found:
                continue
            cells = [
                f"{np.median([run['phases'].get(phase, 0.0) for run in found[name]]):.2f}"
                for phase in _PHASES
            ]
            head = f"| {case.name} | {case.experts} | {case.tokens:,} | {name} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def memory_table(runs: Runs) -> str:
    """Peak memory above what the loaded model needs."""
    lines = [
        "| model | K | tokens | quantizer | peak, MB | above loading, MB |",
        "|---|---|---|---|---|---|",
    ]
    for case, found in runs.items():
        for name, one in found.items():
            if case.cold:
                continue
            kind = "gpu" if "gpu" in one[0]["peak"] else "process"
            peak = np.median([run["peak"][kind] for run in one]) / 1e6
            above = np.median([run["peak"][kind] - run["before"][kind] for run in one]) / 1e6
            lines.append(
                f"| {case.name} | {case.experts} | {case.tokens:,} | {name} | {peak:,.0f} "
                f"| {above:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def chart(runs: Runs, file: Path) -> None:
    """Overhead over stock GPTQ against K and against tokens, as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # the same file for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, of, word in ((axes[0], "experts", "experts K"), (axes[1], "tokens", "tokens")):
        series: dict[tuple, list] = {}
        for case, found in runs.items():
            other = case.tokens if of == "experts" else case.experts
            for name in ("paper", "best"):
                values = ratios(found, name, "gptq")
                if values and not case.cold:
                    key = case.name, other, name
                    series.setdefault(key, []).append((getattr(case, of), np.median(values)))
        for (model, other, name), points in series.items():
            if len(points) < 2:
                continue
            also = f"{other:,} tokens" if of == "experts" else f"K = {other}"
            x, y = zip(*sorted(points), strict=True)
            axis.plot(x, y, marker="o", label=f"{model}, {also}, {name}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(word)
        if of == "tokens":
            axis.set_xscale("log", base=2)
        if axis.lines[1:]:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("time, stock GPTQ = 1")
    axes[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def legend() -> str:
    """What the quantizers are."""
    return "\n".join(f"- `{name}`: {what}" for name, what in QUANTIZERS.items()) + "\n"
