"""How far a layer's outputs lie from every expert's, from the sums that are kept of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...method.statistics import Moments
from ...method.target import gain
from ...run_report import ExpertError
from .sums import ExpertSums, RecordedStatistics


class RecordedWatch:
    """A :class:`~epmq_gptq.method.expert_error.Watch` by whole Grams, of all calibration tokens.

    tr[(W − W_i) H_i (W − W_i)ᵀ] is what the merged weight lacks, less the gain of W over it.

    Args:
        parts: expert → sums, of disjoint sets of rows; their ``lack`` is known.
        layer: full name.
        W_m: ``(out, d)`` fp32 the merged weight.
    """

    def __init__(self, parts: Sequence[Mapping[str, ExpertSums]], layer: str, W_m: torch.Tensor):
        self._W_m, self._layer = W_m, layer
        self._sums: dict[str, list[ExpertSums]] = {}
        for part in parts:
            for expert, sums in part.items():
                self._sums.setdefault(expert, []).append(sums)
        self._lacks: dict[str, float] = {}

    def start(self, W_target: torch.Tensor) -> dict[str, ExpertError]:
        """See :class:`~epmq_gptq.method.expert_error.Watch`."""
        found, change = {}, W_target - self._W_m
        for expert, each in self._sums.items():
            lack = sum(one.layers[self._layer].lack for one in each)
            energy = lack
            for moments in self._moments(expert):
                # W_i = W_m + Δ: tr[W_i H W_iᵀ] is that of W_m, twice tr[W_m Dᵀ], and the lack.
                energy += _of_merge(self._W_m, moments)
            if not energy > 0:
                continue
            tokens = sum(one.tokens for one in each)
            self._lacks[expert] = lack
            found[expert] = ExpertError(
                rows=tokens,
                energy=energy / tokens,
                merged=lack / energy,
                solved=self._left(expert, change) / energy,
            )
        return found

    def finish(
        self, Q: torch.Tensor, shift: torch.Tensor | None, errors: Mapping[str, ExpertError]
    ) -> None:
        """See :class:`~epmq_gptq.method.expert_error.Watch`."""
        change = Q - self._W_m
        for expert, error in errors.items():
            energy = error.energy * error.rows
            error.rounded = self._left(expert, change) / energy
            # A gain without D is less what the change costs.
            moved = -sum(gain(change, None, m._replace(D=None)) for m in self._moments(expert))
            error.quantization = moved / energy
        self._sums = {}

    def _left(self, expert: str, change: torch.Tensor) -> float:
        gained = sum(gain(change, None, moments) for moments in self._moments(expert))
        return max(self._lacks[expert] - gained, 0.0)  # below 0 by what half precision lost

    def _moments(self, expert: str) -> list[Moments]:
        """Unpacked anew each time: rounding waits for nobody, and a Gram is large."""
        found = []
        for sums in self._sums[expert]:
            statistics = RecordedStatistics(expert, sums, 1.0, self._W_m.device)
            found.append(statistics.take(self._layer, statistics.gram()))
        return found


def _of_merge(W_m: torch.Tensor, moments: Moments) -> float:
    """tr[W_m H W_mᵀ] + 2 tr[W_m Dᵀ]."""
    found = float(((W_m @ moments.H) * W_m).sum(dtype=torch.float64))
    if moments.D is not None:
        found += 2 * float((W_m * moments.D).sum(dtype=torch.float64))
    return found
