"""The update ``H += Xᵀ X``: every input's Gram.

``torch_gram_update`` specifies it; ``gram_update`` is the fastest way that agrees with it.
"""

from __future__ import annotations

import functools
import os

import torch

from ..method.chunks import in_halves
from .exact import TOLERANCE, first_exact, has_triton, random

# Rows of one product. Fewer would spend the time on reading and writing the sums (4 d² bytes each
# way for 2 d² FLOP per row); of half-precision rows more would not do either, for tensor cores
# truncate what they add up, and an fp32 sum must take over before that shows.
ROWS = max(16, min(2048, int(os.environ.get("EPMQ_CHUNK_ROWS") or 2048)))
# Columns of one block of the triangle at least, and blocks at most: with 8 blocks 9/16 of the
# square are computed.
_BLOCK, _BLOCKS = 96, 8


def torch_gram_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """Add the Gram of one batch of inputs, in place: ``H += Xᵀ X``.

    The products and the sum are fp32 whatever the inputs are: half-precision rows are widened
    first, which changes no bit of them.

    Args:
        H: ``(d, d)`` fp32, symmetric.
        X: ``(n, d)`` floating; one row per token, on the device of ``H``.
    """
    X = X.to(torch.float32)
    H.addmm_(X.t(), X)


# ---- symmetric sums --------------------------------------------------------------------------


def gram_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """``H += Xᵀ X`` for the upper triangle alone; :func:`mirror_` makes the other one of it.

    Args:
        H: ``(d, d)`` fp32, of which only the diagonal and what is above it means anything.
        X: ``(n, d)`` floating; one row per token, on the device of ``H``.
    """
    way = _on_gpu(X.dtype, H.device) if H.is_cuda else triangle_update
    for rows in X.split(ROWS):
        in_halves(lambda part: way(H, part), rows)


def triangle_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """:func:`gram_update` as products of column blocks, without those below the diagonal. Where one
    finds no room, that block alone takes fewer rows: others are added by then."""
    X = X.to(torch.float32)
    for start, stop in _blocks(H.shape[0]):
        _add(H[start:stop, start:], X[:, start:stop], X[:, start:])


def _add(C: torch.Tensor, L: torch.Tensor, R: torch.Tensor) -> None:
    in_halves(lambda left, right: C.addmm_(left.t(), right), L, R)


def mirror_(H: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of ``H: (d, d)`` to the lower one, in place. Returns ``H``."""
    for start, stop in _blocks(H.shape[0]):
        block = H[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).t())
        H[stop:, start:stop].copy_(H[start:stop, stop:].t())
    return H


def _blocks(columns: int) -> list[tuple[int, int]]:
    size = max(_BLOCK, -(-columns // _BLOCKS))
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


# ---- GPUs --------------------------------------------------------------------------------------


def mixed_gram_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """:func:`gram_update` of the whole square on tensor cores: half-precision products, which fp32
    holds exactly, and an fp32 sum."""
    torch.ops.aten.addmm.dtype_out(H, X.t(), X, torch.float32, out=H)


@functools.cache
def _on_gpu(dtype: torch.dtype, device: torch.device):
    if dtype not in (torch.float16, torch.bfloat16):
        return triangle_update
    ways = [mixed_gram_update]
    if has_triton():
        from .gram_triton import triton_gram_update

        ways.append(triton_gram_update)
    # A full chain of sums, and sizes that no tile divides.
    X = random(ROWS - 3, 200, device=device).to(dtype)
    H = random(200, 200, device=device, seed=1)
    return first_exact(
        ways, triangle_update, lambda way: gram_agrees(way, H.clone(), X), what="Grams"
    )


def gram_agrees(update, H: torch.Tensor, X: torch.Tensor) -> bool:
    """Whether ``update`` gives the upper triangle of ``H + Xᵀ X``; ``H`` is written to."""
    wide = X.double()
    expected = H.double() + wide.T @ wide
    update(H, X)
    norm = wide.norm(dim=0)
    wrong = (H.double() - expected).abs().triu()
    return bool((wrong <= TOLERANCE * torch.outer(norm, norm)).all())
