"""The target that is rounded and the curvature it is rounded with (arXiv 2605.16882, eq. 12–20).

    min_Q Σ_i ‖Q X_i − W_i X_i‖² + λ ‖Q − W_m‖²                      (eq. 12)
      = min_Q tr[(Q − W*) H_E (Q − W*)ᵀ] + const,
    H_E = H + λ I,  λ = α tr(H) / d,  W* = W_m + D H_E⁻¹             (eq. 13, 15, 20)

so GPTQ's rounding of ``W*`` with curvature ``H_E`` solves eq. 12, and λ is GPTQ's damping.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def anchor_strength(H: torch.Tensor, alpha: float) -> float:
    """λ = α tr(H) / d (eq. 13). ``H: (d, d)``."""
    return alpha * float(H.diagonal().sum(dtype=torch.float64)) / H.shape[0]


def add_anchor_(H: torch.Tensor, lam: float) -> torch.Tensor:
    """``H_E = H + λ I`` in place (eq. 15). Returns ``H``."""
    H.diagonal().add_(lam)
    return H


def numerical_rank(H: torch.Tensor) -> int:
    """Rank of the Gram ``H: (d, d)`` fp32: eigenvalues above d · eps(fp32) · the largest."""
    eigenvalues = torch.linalg.eigvalsh(H.to(torch.float64))
    largest = float(eigenvalues[-1].clamp_min(0))
    floor = H.shape[0] * torch.finfo(torch.float32).eps * largest
    return int((eigenvalues > floor).sum())


class Target(NamedTuple):
    """What one linear layer is rounded towards.

    Attributes:
        W: ``W*: (out, d)`` fp32.
        merge_excess: tr[(W_m − W*) H_E (W_m − W*)ᵀ], how far eq. 12 of the unrounded merge lies
            above its unquantized optimum.
    """

    W: torch.Tensor
    merge_excess: float


def expert_target(W_m: torch.Tensor, D: torch.Tensor | None, L: torch.Tensor) -> Target:
    """``W* = W_m + D H_E⁻¹`` (eq. 20 in delta form).

    Args:
        W_m: ``(out, d)`` fp32, the merged weight.
        D: ``(out, d)`` fp32, Σ (W_i − W_m) H_i, or None where it is exactly zero.
        L: ``(d, d)`` fp32, lower Cholesky factor of ``H_E``.
    """
    if D is None:
        return Target(W_m.clone(), 0.0)
    shift = torch.cholesky_solve(D.mT, L).mT
    # (W* − W_m) H_E (W* − W_m)ᵀ = shift · Dᵀ, so the trace needs no further product.
    merge_excess = float((shift * D).sum(dtype=torch.float64))
    return Target((W_m + shift).contiguous(), merge_excess)


def objective(
    Q: torch.Tensor,
    W_m: torch.Tensor,
    experts: list[tuple[torch.Tensor, torch.Tensor]],
    lam: float,
) -> float:
    """Eq. 12 as it stands, in float64: the judge of every result, never part of the solve.

    Args:
        Q: ``(out, d)`` the (dequantized) weight that is judged.
        W_m: ``(out, d)`` the merged weight.
        experts: pairs ``(W_i: (out, d), H_i: (d, d))``.
        lam: λ.
    """
    Q = Q.double()
    value = lam * float((Q - W_m.double()).square().sum())
    for W_i, H_i in experts:
        E = Q - W_i.double()
        value += float(((E @ H_i.double()) * E).sum())
    return value
