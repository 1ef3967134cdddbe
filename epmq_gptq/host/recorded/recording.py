"""Keeping the statistics of a run: packed as they are stored, and used as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...method.deltas import WeightDelta
from ...method.statistics import GroupStatistics, Moments
from ...method.weighting import Weighting
from .bundle import PARTS, RecordedLayer, Recorder
from .sums import ExpertSums, RecordedStatistics


class Watched(NamedTuple):
    """One linear layer of an input.

    Attributes:
        name: full name.
        W_m: ``(out, d)`` fp32.
        eta, rho: of its target.
    """

    name: str
    W_m: torch.Tensor
    eta: float
    rho: float


class Recording:
    """Keeps the sums over every input of a run, and hands back what was kept.

    The run goes on with the numbers as they are stored, so that the same numbers give the same
    codes later.

    Args:
        experts: their names, in the order in which they are added up.
        weighting: β_i; what is stored is without it.
        delta: (layer, expert, W_m) → W_i − W_m.
        lacks: whether D is Σ (W_i − W_m) H_i, so that Σ‖(W_i − W_m) x‖² follows from it.
    """

    def __init__(
        self,
        experts: Sequence[str],
        weighting: Weighting,
        delta: Callable[[str, str, torch.Tensor], WeightDelta],
        *,
        lacks: bool,
    ):
        self.recorder = Recorder()
        self._experts = list(experts)
        self._weighting = weighting
        self._delta = delta
        self._lacks = lacks

    def keep(
        self,
        layers: Sequence[Watched],
        columns: int,
        parts: Sequence[dict[str, GroupStatistics]],
    ) -> list[dict[str, RecordedStatistics]]:
        """Store the sums over one input.

        Args:
            layers: those that read it.
            columns: its width.
            parts: expert → sums, of the rows that are fitted to and of those held out; given away.
        """
        kept: list[dict[str, RecordedStatistics]] = []
        stored: dict[str, dict[str, ExpertSums]] = {}
        for part, statistics in zip(PARTS, parts, strict=True):
            kept.append({})
            for expert in self._experts:
                one = statistics.pop(expert, None)
                if one is None or not one.total_tokens:
                    continue
                sums = self._packed(expert, layers, one)
                stored.setdefault(part, {})[expert] = sums
                kept[-1][expert] = recorded(expert, sums, self._weighting, one.device)
        about = {one.name: RecordedLayer(len(one.W_m), one.eta, one.rho) for one in layers}
        self.recorder.add(columns, about, stored)
        return kept

    def miss(self, layers: Mapping[str, int], columns: int, why: str) -> None:
        """Note that nothing can be said of the layers of an input; name → outputs."""
        about = {name: RecordedLayer(count, bad=why) for name, count in layers.items()}
        self.recorder.add(columns, about, {})

    def _packed(
        self, expert: str, layers: Sequence[Watched], statistics: GroupStatistics
    ) -> ExpertSums:
        tokens, H = statistics.total_tokens, statistics.gram()
        moments: dict[str, Moments] = {}
        lacks: dict[str, float | None] = {}
        for layer in layers:
            one = moments[layer.name] = statistics.take(layer.name, H, layer.W_m)
            if self._lacks:
                lacks[layer.name] = _lack(self._delta(layer.name, expert, layer.W_m), one.D)
        return ExpertSums.of(tokens, moments, lacks)


def recorded(
    expert: str, sums: ExpertSums, weighting: Weighting, device: torch.device
) -> RecordedStatistics:
    """Sums as they are stored, with the weight of their expert."""
    norms = sums.gram.norms
    return RecordedStatistics(expert, sums, weighting.of(expert, norms * norms), device)


def _lack(delta: WeightDelta, D: torch.Tensor | None) -> float:
    """tr[Δ H Δᵀ] for ``D = Δ H``."""
    if D is None:
        return 0.0
    total = 0.0
    if delta.dense is not None:
        total += float((delta.dense * D).sum(dtype=torch.float64))
    if delta.low_rank is not None:
        B, A = delta.low_rank
        total += float(((B.mT @ D) * A).sum(dtype=torch.float64))
    return total


def about_run(report: Any, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What the index of a bundle says of the run that it is from.

    Args:
        report: of the run.
        options: of its configuration, as they were settled; without places.
        dtype: that the model was computed in.
    """
    made = report.provenance
    return {
        "versions": made["versions"],
        "profile": made["profile"],
        "merged": made["merged"],
        "merge": made.get("merge", {}),
        "base": made.get("base"),
        "experts": made["experts"],
        "tokens": report.tokens,
        "rows": report.rows,
        "dtype": str(dtype).removeprefix("torch."),
        "options": dict(options),
        "left": report.left,
    }
