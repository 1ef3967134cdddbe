"""α from held-out rows: several solves from one set of sums, and the best of them.

For each α of a grid the target W* is solved from the rows that are fitted to, and judged by what
is left of ‖T − b − W* x‖² on rows that are not. W_m itself is in the grid (α → ∞), so what is
chosen is never worse than the merged weights there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .statistics import Moments
from .target import add_anchor_, anchor_strength, bias_shift, centred, gain

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


class Chosen(NamedTuple):
    """What the held-out rows say of the layers of one input.

    Attributes:
        alpha: the best of the grid, or None where W_m itself is.
        gains: α → held-out gain over W_m, summed over the layers.
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
    for free in dict.fromkeys(refit_bias):
        members = [m for m, one in enumerate(refit_bias) if one == free]
        sums = [centred(fitted[m]) if free else fitted[m] for m in members]
        H = sums[0].H
        for alpha in grid:
            H_E = add_anchor_(H.clone(), anchor_strength(H, alpha), anchor)
            L, info = torch.linalg.cholesky_ex(H_E)
            if int(info):
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
