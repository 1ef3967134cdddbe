"""The update ``D += A B`` in fp32: cross moments, and ``(W_i − W_m) H_i`` in every fold.

``torch_product_update`` specifies it; ``product_update`` takes the fastest way that agrees with it.
"""

from __future__ import annotations

import functools

import torch

from .gram import ROWS
from .race import TOLERANCE, fastest

# Halves that an fp32 number is split into: 8 bits each hold all 24 of its mantissa.
_PARTS = 3


def torch_product_update(
    D: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0
) -> None:
    """Add a product, in place: ``D += alpha A B``, products and sum in fp32.

    Args:
        D: ``(k, d)`` fp32.
        A: ``(k, n)`` floating.
        B: ``(n, d)`` floating.
        alpha: a factor.
    """
    D.addmm_(A.to(torch.float32), B.to(torch.float32), alpha=alpha)


def product_update(D: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0) -> None:
    """:func:`torch_product_update`, on tensor cores where that is as exact and faster."""
    way = _on_gpu(*D.shape, A.shape[1], A.dtype, B.dtype, D.device) if D.is_cuda else None
    (way or torch_product_update)(D, A, B, alpha)


def cross_update(C: torch.Tensor, Y: torch.Tensor, X: torch.Tensor) -> None:
    """Add the products of two views of one batch, in place: ``C += Yᵀ X``.

    Args:
        C: ``(k, d)`` fp32.
        Y: ``(n, k)`` floating; one row per token.
        X: ``(n, d)`` floating; the same tokens.
    """
    for left, right in zip(Y.split(ROWS), X.split(ROWS), strict=True):
        product_update(C, left.t(), right)


def split_product_update(
    D: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0, *, multiply=None
) -> None:
    """:func:`torch_product_update` as bfloat16 products with fp32 sums.

    Each factor is a sum of three bfloat16 numbers of falling size; of their nine products the six
    that are above 2⁻²⁴ of the whole are added, the smallest first. A factor that is bfloat16 has
    one part.

    Args:
        D, A, B, alpha: see :func:`torch_product_update`.
        multiply: ``(D, A, B, alpha)`` for bfloat16 factors; by default torch's on tensor cores.
    """
    multiply = multiply or _mixed_product_update
    left, right = _parts(A), _parts(B)
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < _PARTS]
    for i, j in sorted(pairs, key=sum, reverse=True):
        multiply(D, left[i], right[j], alpha)


def _parts(A: torch.Tensor) -> list[torch.Tensor]:
    if A.dtype == torch.bfloat16:
        return [A]
    rest, parts = A.to(torch.float32), []
    for _ in range(_PARTS):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    return parts


def _mixed_product_update(D: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> None:
    torch.ops.aten.addmm.dtype_out(D, A, B, torch.float32, alpha=alpha, out=D)


@functools.lru_cache(maxsize=64)
def _on_gpu(
    rows: int,
    columns: int,
    depth: int,
    left: torch.dtype,
    right: torch.dtype,
    device: torch.device,
):
    if not rows or not columns or depth < 256:
        return torch_product_update  # nothing to win

    def arguments(rows: int, columns: int, depth: int) -> tuple[torch.Tensor, ...]:
        A = torch.randn(rows, depth, device=device).to(left)
        B = torch.randn(depth, columns, device=device).to(right)
        return torch.zeros(rows, columns, device=device), A, B

    ways = [split_product_update, torch_product_update]
    odd = arguments(200, 120, 333)
    return fastest(
        ways,
        arguments(rows, columns, depth),
        lambda way: product_agrees(way, *odd),
        what="products",
    )


def product_agrees(update, D: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether ``update`` gives ``D + A B``; ``D`` is written to."""
    left, right = A.double(), B.double()
    expected = D.double() + left @ right
    update(D, A, B)
    size = torch.outer(left.norm(dim=1), right.norm(dim=0))
    return bool(((D.double() - expected).abs() <= TOLERANCE * size).all())
