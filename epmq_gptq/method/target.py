"""The target that is rounded and the curvature it is rounded with (arXiv 2605.16882, eq. 12–20).

    min_Q Σ_i ‖Q X_i − W_i X_i‖² + λ ‖Q − W_m‖²                      (eq. 12)
      = min_Q tr[(Q − W*) H_E (Q − W*)ᵀ] + const,
    H_E = H + λ I,  λ = α tr(H) / d,  W* = W_m + D H_E⁻¹             (eq. 13, 15, 20)

so GPTQ's rounding of ``W*`` with curvature ``H_E`` solves eq. 12, and λ is GPTQ's damping. With
other targets T_i than W_i x only ``D`` differs (``statistics.py``), and with another anchor only
what is added to the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .statistics import Moments

ANCHORS = ("identity", "channel")


def anchor_strength(H: torch.Tensor, alpha: float) -> float:
    """λ = α tr(H) / d (eq. 13). ``H: (d, d)``."""
    return alpha * float(H.diagonal().sum(dtype=torch.float64)) / H.shape[0]


def add_anchor_(H: torch.Tensor, lam: float, kind: str = "identity") -> torch.Tensor:
    """``H_E = H + λ A`` in place (eq. 15). Returns ``H``.

    Args:
        kind: ``"identity"``: A = I, the paper's. ``"channel"``: A = diag(H) d / tr(H), which is the
            same pull relative to each channel's energy, whatever the scaling of the inputs; a
            channel without any keeps A = 1.
    """
    diagonal = H.diagonal()
    if kind == "channel":
        mean = diagonal.sum(dtype=torch.float64) / H.shape[0]
        share = torch.where(diagonal > 0, diagonal / mean.to(H.dtype), torch.ones_like(diagonal))
        diagonal.add_(share, alpha=lam)
    else:
        diagonal.add_(lam)
    return H


def centred(layers: Sequence[Moments]) -> list[Moments]:
    """The moments around the mean input, of layers of one input whose biases are fitted as well.

    With b free, Σ ‖Q x + b − T‖² is least at b = mean(T − Q x), and what is left of it as a
    function of Q has ``H − s sᵀ/n`` and ``D − d sᵀ/n`` for H and D, s and d being the sums of x and
    of T − b_m − W_m x.
    """
    H, _, s, _, n = layers[0]
    around = torch.addr(H, s, s, alpha=-1 / n)  # one for all of them
    found = []
    for one in layers:
        d, D = one.outputs, one.D
        D = torch.zeros(d.shape[0], H.shape[0], device=H.device) if D is None else D
        found.append(one._replace(H=around, D=torch.addr(D, d, s, alpha=-1 / n)))
    return found


def bias_shift(change: torch.Tensor, moments: Moments) -> torch.Tensor:
    """b − b_m: the mean over the tokens of what the weights leave, ``(out,)``.

    Args:
        change: ``(out, d)`` Q − W_m.
        moments: with ``inputs`` and ``outputs``.
    """
    return (moments.outputs - change @ moments.inputs) / moments.count


def gain(change: torch.Tensor, shift: torch.Tensor | None, moments: Moments) -> float:
    """How much Σ ‖Q x + b − T‖² falls when W_m, b_m become W_m + change, b_m + shift.

    Args:
        change: ``(out, d)``.
        shift: ``(out,)``, or None where the bias stays.
        moments: of other tokens than ``change`` was fitted to: a held-out gain.
    """
    H, D, s, d, n = moments
    cross = 0.0 if D is None else float((change * D).sum(dtype=torch.float64))
    square = float(((change @ H) * change).sum(dtype=torch.float64))
    if shift is not None:
        cross += float((shift * d).sum(dtype=torch.float64))
        moved = change @ s
        square += float((shift * (2 * moved + n * shift)).sum(dtype=torch.float64))
    return 2 * cross - square


def numerical_rank(H: torch.Tensor) -> int:
    """Rank of the Gram ``H: (d, d)`` fp32: eigenvalues above d · eps(fp32) · the largest."""
    eigenvalues = torch.linalg.eigvalsh(H.to(torch.float64))
    largest = float(eigenvalues[-1].clamp_min(0))
    floor = H.shape[0] * torch.finfo(torch.float32).eps * largest
    return int((eigenvalues > floor).sum())


def solved(D: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    """``D H_E⁻¹: (out, d)``, for ``D: (out, d)`` and the lower Cholesky factor ``L`` of ``H_E``."""
    # Two solves from the right: faster than `cholesky_solve`, which wants D transposed.
    half = torch.linalg.solve_triangular(L.mT, D, upper=True, left=False)
    return torch.linalg.solve_triangular(L, half, upper=False, left=False)


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
    shift = solved(D, L)
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
