"""The factor of an inverse that GPTQ rounds with, from one Cholesky factorisation."""

from __future__ import annotations

import torch

# Below this the library's triangular solve is as fast as anything else.
_LEAF = 128


def torch_inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """``U: (d, d)`` fp32, upper triangular, with ``UᵀU = H⁻¹``, for ``H: (d, d)``.

    Raises:
        torch.linalg.LinAlgError: ``H`` is not positive definite.
    """
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def inverse_factor(H: torch.Tensor) -> torch.Tensor | None:
    """:func:`torch_inverse_factor` with half its work; None where ``H`` is not positive definite.

    With J the reversal of order and ``J H J = L Lᵀ``, ``U = J L⁻¹ J``: one factorisation and the
    inverse of a triangle, and neither H⁻¹ nor a factorisation of it.
    """
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        return None
    return _invert_triangle_(L).flip(0, 1)


def _invert_triangle_(L: torch.Tensor) -> torch.Tensor:
    """Invert the lower triangular ``L`` in place, by halves; what is above its diagonal stays."""
    d = L.shape[0]
    if d <= _LEAF:
        identity = torch.eye(d, dtype=L.dtype, device=L.device)
        return L.copy_(torch.linalg.solve_triangular(L, identity, upper=False))
    half = d // 2
    first, second, below = L[:half, :half], L[half:, half:], L[half:, :half]
    _invert_triangle_(first)
    _invert_triangle_(second)
    below.copy_((second @ below) @ first).neg_()
    return L
