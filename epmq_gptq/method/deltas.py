"""Differences of two weights, whole or of low rank, and what they say of missing calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.gram import gram_update, mirror_
from ..kernels.product import in_parts, product_update, torch_product_update

# Rows of a low-rank difference that are built at once.
_ROWS = 1024


class WeightDelta(NamedTuple):
    """A difference of two weights, ``dense + B A``; all fp32.

    Attributes:
        dense: ``(out, d)``, or None where that part is zero.
        low_rank: ``(B: (out, r), A: (r, d))``, or None. Never multiplied out.
    """

    dense: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None

    def size(self) -> float:
        """Σ|dense| + Σ|B| Σ|A|: zero where nothing differs, not finite where something is not."""
        # The norm, for `abs()` would be one more matrix of this size.
        total = 0.0 if self.dense is None else float(torch.linalg.vector_norm(self.dense, 1))
        if self.low_rank is not None:
            B, A = self.low_rank
            total += float(B.abs().sum() * A.abs().sum())
        return total

    def add_product_(self, D: torch.Tensor, H: torch.Tensor) -> None:
        """``D += (dense + B A) H`` with ``D: (out, d)``, ``H: (d, d)``, as ``B (A H)``."""
        if self.dense is not None:
            product_update(D, self.dense, H)
        if self.low_rank is not None:
            B, A = self.low_rank
            in_parts(torch_product_update, D, B, A @ H)

    def thinned(self, step: int) -> WeightDelta:
        """The difference of every ``step``-th output."""
        if step == 1:
            return self
        low_rank = None if self.low_rank is None else (self.low_rank[0][::step], self.low_rank[1])
        return WeightDelta(None if self.dense is None else self.dense[::step], low_rank)

    def outputs(self, X: torch.Tensor) -> torch.Tensor:
        """``X (dense + B A)ᵀ: (n, out)`` of ``X: (n, d)``, as ``(X Aᵀ) Bᵀ``."""
        found = None if self.dense is None else X @ self.dense.t()
        if self.low_rank is None:
            return found
        B, A = self.low_rank
        through = X @ A.t()
        return through @ B.t() if found is None else found.addmm_(through, B.t())


def data_free_gram(task_vector: WeightDelta, energy: float) -> torch.Tensor:
    """A stand-in for ``H_i`` where there is no calibration: τᵀτ, scaled to a trace.

    What fine-tuning changed most is what its inputs excited most: a gradient step adds multiples of
    the inputs to the rows of τ = W_i − W_0. WUDI (arXiv 2503.08099) merges with the same proxy.

    Args:
        task_vector: τ, ``(out, d)``; at least one of its parts.
        energy: tr(H_i) that it shall have.

    Returns:
        ``(d, d)`` fp32; zero where τ is zero.
    """
    dense, low_rank = task_vector
    if dense is None:
        B, A = low_rank
        C = A.mT @ ((B.mT @ B) @ A)
    else:
        C = torch.zeros(dense.shape[1], dense.shape[1], device=dense.device)
        for start in range(0, dense.shape[0], _ROWS):
            rows = dense[start : start + _ROWS]
            if low_rank is not None:
                rows = rows + low_rank[0][start : start + _ROWS] @ low_rank[1]
            gram_update(C, rows)
        mirror_(C)
    trace = float(C.diagonal().sum(dtype=torch.float64))
    return C.mul_(energy / trace) if trace > 0 else C.zero_()
