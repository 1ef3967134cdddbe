"""The update ``D += A B`` in fp32: cross moments, and ``(W_i − W_m) H_i`` in every fold.

``torch_product_update`` specifies it; ``product_update`` is the fastest way that agrees with it.
"""

from __future__ import annotations

import functools

import torch

from ..method.chunks import in_halves
from .exact import TOLERANCE, first_exact, random
from .gram import ROWS

# Halves that an fp32 number is split into: 8 bits each hold all 24 of its mantissa.
_PARTS = 3
# Smallest side of a product that is split: the parts have to be made first.
_WORTH_IT = 256


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
    way = torch_product_update
    if D.is_cuda and min(*D.shape, A.shape[1]) >= _WORTH_IT:
        way = _on_gpu(A.dtype, B.dtype, D.device)
    in_parts(way, D, A, B, alpha)


def in_parts(way, D: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0) -> None:
    """``way(D, A, B, alpha)``, of fewer of the products at once where memory is short.

    Args:
        way: see :func:`torch_product_update`; of ``ROWS`` products at most it must either add all
            or raise.
    """
    rows = ROWS if way is split_product_update else A.shape[1]
    for left, right in zip(A.t().split(rows), B.split(rows), strict=True):
        in_halves(lambda L, R: way(D, L.t(), R, alpha), left, right)


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
    one part. At most ``ROWS`` products are added up on tensor cores before an fp32 sum takes over.

    Args:
        D, A, B, alpha: see :func:`torch_product_update`.
        multiply: ``(D, A, B, alpha)`` for bfloat16 factors; by default torch's on tensor cores.
    """
    multiply = multiply or _mixed_product_update
    for some_of_A, some_of_B in zip(A.split(ROWS, dim=1), B.split(ROWS), strict=True):
        left, right = _parts(some_of_A), _parts(some_of_B)
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < _PARTS]
        for i, j in sorted(pairs, key=sum, reverse=True):
            in_halves(lambda L, R: multiply(D, L.t(), R, alpha), left[i].t(), right[j])


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


@functools.cache
def _on_gpu(left: torch.dtype, right: torch.dtype, device: torch.device):
    A = random(200, ROWS - 3, device=device).to(left)
    B = random(ROWS - 3, 120, device=device, seed=1).to(right)
    D = random(200, 120, device=device, seed=2)
    return first_exact(
        [split_product_update],
        torch_product_update,
        lambda way: product_agrees(way, D.clone(), A, B),
        what="products",
    )


def product_agrees(update, D: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether ``update`` gives ``D + A B``; ``D`` is written to."""
    left, right = A.double(), B.double()
    expected = D.double() + left @ right
    update(D, A, B)
    size = torch.outer(left.norm(dim=1), right.norm(dim=0))
    return bool(((D.double() - expected).abs() <= TOLERANCE * size).all())
