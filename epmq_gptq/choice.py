"""What is chosen by solving more than once: α by held-out rows, weights by the worst expert.

For each α of a grid the target W* is solved from the rows that are fitted to, and judged by what
is left of ‖T − b − W* x‖² on rows that are not. W_m itself is in the grid (α → ∞), so what is
chosen is never worse than the merged weights there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .statistics import Moments
from .target import add_anchor_, anchor_strength, bias_shift, centred, gain

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Least λ over tr(H): so H_E has a condition of 1e6 at most, and λ is above the rounding of the sums
# (also of what is left of them around the mean). fp32 cannot hold the inverse of much worse ones.
LEAST = 1e-6


class Chosen(NamedTuple):
    """What the held-out rows say of the layers of one input.

    Attributes:
        alpha: the best of the grid, or None where W_m itself is.
        gains: α → held-out gain over W_m, summed over the layers; -inf where fp32 cannot solve it.
    """

    alpha: float | None
    gains: dict[float, float]


def choose_alpha(
    fitted: Sequence[Moments],
    held_out: Sequence[Moments],
    *,
    anchor: str = "identity",
    refit_bias: Sequence[bool] = (),
    grid: Sequence[float] = GRID,
) -> Chosen:
    """The α under which the layers of one input do best on rows that they were not fitted to.

    Args:
        fitted, held_out: moments of each layer, ``H`` being the same for all of them.
        anchor: one of :data:`~epmq_gptq.target.ANCHORS`.
        refit_bias: per layer, whether its bias is fitted as well.
        grid: what is tried.
    """
    refit_bias = list(refit_bias) or [False] * len(fitted)
    gains = dict.fromkeys(grid, 0.0)
    least = LEAST * float(fitted[0].H.diagonal().sum(dtype=torch.float64))
    for free in dict.fromkeys(refit_bias):
        members = [m for m, one in enumerate(refit_bias) if one == free]
        sums = [fitted[m] for m in members]
        sums = centred(sums) if free else sums
        H = sums[0].H
        for alpha in grid:
            lam = anchor_strength(H, alpha)
            L, info = torch.linalg.cholesky_ex(add_anchor_(H.clone(), lam, anchor))
            if lam < least or int(info):
                gains[alpha] = float("-inf")
                continue
            for m, moments in zip(members, sums, strict=True):
                if moments.D is None:
                    continue
                change = torch.cholesky_solve(moments.D.mT, L).mT
                shift = bias_shift(change, fitted[m]) if free else None
                gains[alpha] += gain(change, shift, held_out[m])
    best = max(grid, key=lambda alpha: gains[alpha])
    return Chosen(best if gains[best] > 0 else None, gains)


# How often the weights are moved, and by what factor an expert that keeps nothing gains on one
# that keeps all that it could.
_ROUNDS, _STEP = 8, 2.0


def min_max_weights(
    parts: Mapping[str, Sequence[Moments]], alpha: float, *, anchor: str = "identity"
) -> dict[str, float]:
    """β_i that raise the expert of which the least is kept, for the layers of one input.

    What is kept of expert i is the gain of the common target on its rows, as a share of the gain of
    a target of its own. Multiplicative weights: those who keep less than the mean count more.

    Args:
        parts: expert → moments of each layer, from its rows alone.
        alpha: strength of the anchor meanwhile.
        anchor: what λ multiplies.

    Returns:
        Weights with mean 1, those of the round in which the worst expert kept most.
    """
    own = {
        name: _gain_of(_solved([moments], [1.0], alpha, anchor), moments)
        for name, moments in parts.items()
    }
    names = [name for name, most in own.items() if most > 0]
    weights = dict.fromkeys(parts, 1.0)
    best, worst = weights, float("-inf")
    for _ in range(_ROUNDS if len(names) > 1 else 0):
        changes = _solved(list(parts.values()), list(weights.values()), alpha, anchor)
        kept = {name: _gain_of(changes, parts[name]) / own[name] for name in names}
        if min(kept.values()) > worst:
            best, worst = weights, min(kept.values())
        mean = sum(kept.values()) / len(kept)
        moved = {
            name: weight * _STEP ** (mean - kept.get(name, mean))
            for name, weight in weights.items()
        }
        total = sum(moved.values()) / len(moved)
        weights = {name: weight / total for name, weight in moved.items()}
    return best


def _solved(
    parts: Sequence[Sequence[Moments]], weights: Sequence[float], alpha: float, anchor: str
) -> list[torch.Tensor | None]:
    """W* − W_m of each layer under these weights."""
    H = sum(weight * part[0].H for part, weight in zip(parts, weights, strict=True))
    L, info = torch.linalg.cholesky_ex(add_anchor_(H, anchor_strength(H, alpha), anchor))
    if int(info):
        return [None] * len(parts[0])
    changes = []
    for layer in range(len(parts[0])):
        known = [
            weight * part[layer].D
            for part, weight in zip(parts, weights, strict=True)
            if part[layer].D is not None
        ]
        changes.append(torch.cholesky_solve(sum(known).mT, L).mT if known else None)
    return changes


def _gain_of(changes: Sequence[torch.Tensor | None], moments: Sequence[Moments]) -> float:
    pairs = zip(changes, moments, strict=True)
    return sum(gain(change, None, one) for change, one in pairs if change is not None)
