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
from .target import add_anchor_, anchor_strength, bias_shift, centred, gain, solved

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Least λ over tr(H): so H_E has a condition of 1e6 at most, and λ is above the rounding of the sums
# (also of what is left of them around the mean). fp32 cannot hold the inverse of much worse ones.
LEAST = 1e-6


# How many of them are tried: every third, and two neighbours.
MOST = len(GRID[1::3]) + 2
# Outputs of each layer that α is chosen by, evenly spaced: the gain is a sum over outputs, all of
# which see the same inputs, and where there are thousands some hundreds tell the same.
OUTPUTS = 256


class Chosen(NamedTuple):
    """What the held-out rows say of the layers of one input.

    Attributes:
        alpha: the best that was tried, or None where W_m itself is.
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
    outputs: int = OUTPUTS,
) -> Chosen:
    """The α under which the layers of one input do best on rows that they were not fitted to.

    Every third of the grid is tried, then the neighbours of the best of these.

    Args:
        fitted, held_out: moments of each layer, ``H`` being the same for all of them.
        anchor: one of :data:`~epmq_gptq.method.target.ANCHORS`.
        refit_bias: per layer, whether its bias is fitted as well.
        grid: what may be tried, in order.
        outputs: of each layer that are looked at.
    """
    refit_bias = list(refit_bias) or [False] * len(fitted)
    judges = []
    for free in dict.fromkeys(refit_bias):
        members = [m for m, one in enumerate(refit_bias) if one == free]
        judges.append(_Judge([_Pair.of(fitted[m], held_out[m], outputs) for m in members], free))
    least = LEAST * float(fitted[0].H.diagonal().sum(dtype=torch.float64))
    gains: dict[float, float] = {}

    def look(places: Sequence[int]) -> int:
        """The best of these places of the grid."""
        for place in places:
            alpha = grid[place]
            if alpha not in gains:
                gains[alpha] = sum(judge.gain(alpha, anchor, least) for judge in judges)
        # Where none can be solved, a stronger anchor is more likely to help.
        return max(places, key=lambda place: (gains[grid[place]], place))

    coarse = look(range(min(1, len(grid) - 1), len(grid), 3))
    best = look([p for p in (coarse, coarse - 1, coarse + 1) if 0 <= p < len(grid)])
    alpha = grid[best]
    return Chosen(alpha if gains[alpha] > 0 else None, gains)


class _Pair(NamedTuple):
    """Moments of some outputs of one layer.

    Attributes:
        fitted, held_out: of the rows that are fitted to, and of those that judge.
        share: outputs of the layer for each of these.
    """

    fitted: Moments
    held_out: Moments
    share: float

    @classmethod
    def of(cls, fitted: Moments, held_out: Moments, outputs: int) -> _Pair:
        """Of at most so many outputs, evenly spaced."""
        known = next((t for t in (fitted.D, fitted.outputs) if t is not None), None)
        step = 1 if known is None else -(-len(known) // outputs)
        if step == 1:
            return cls(fitted, held_out, 1.0)
        some = [
            one._replace(
                D=None if one.D is None else one.D[::step].contiguous(),
                outputs=None if one.outputs is None else one.outputs[::step],
            )
            for one in (fitted, held_out)
        ]
        return cls(*some, len(known) / len(known[::step]))


class _Judge:
    """The held-out gain of layers of one input whose biases are all fitted, or all stay."""

    def __init__(self, pairs: Sequence[_Pair], free: bool):
        self._pairs, self._free = pairs, free
        sums = [pair.fitted for pair in pairs]
        self._sums = centred(sums) if free else sums

    def gain(self, alpha: float, anchor: str, least: float) -> float:
        """Of W*(α) over W_m; -inf where fp32 cannot solve it, or λ is below ``least``."""
        H = self._sums[0].H
        lam = anchor_strength(H, alpha)
        L, info = torch.linalg.cholesky_ex(add_anchor_(H.clone(), lam, anchor))
        if lam < least or int(info):
            return float("-inf")
        total = 0.0
        for pair, moments in zip(self._pairs, self._sums, strict=True):
            if moments.D is None:
                continue
            change = solved(moments.D, L)
            shift = bias_shift(change, pair.fitted) if self._free else None
            total += pair.share * gain(change, shift, pair.held_out)
        return total


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
        changes.append(solved(sum(known), L) if known else None)
    return changes


def _gain_of(changes: Sequence[torch.Tensor | None], moments: Sequence[Moments]) -> float:
    pairs = zip(changes, moments, strict=True)
    return sum(gain(change, None, one) for change, one in pairs if change is not None)
