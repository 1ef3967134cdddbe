"""``gram_update`` in Triton: tiles of the upper triangle alone, added to ``H`` in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of a tile of H, and tokens of one step.
_TILE, _DEPTH = 128, 64


@triton.jit
def _gram_kernel(X, H, n, d, x_stride, h_stride, TILE: tl.constexpr, DEPTH: tl.constexpr):
    # Programs count the tiles of the triangle column by column: (0,0), (0,1), (1,1), (0,2), ...
    number = tl.program_id(0)
    j = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    # A square root of a float may be off by one at the corners.
    j = tl.where(j * (j + 1) // 2 > number, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= number, j + 1, j)
    i = number - j * (j + 1) // 2
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, n, DEPTH):
        token = start + tl.arange(0, DEPTH)
        rows = X + token[:, None].to(tl.int64) * x_stride
        inside = token[:, None] < n
        A = tl.load(rows + left[None, :], mask=inside & (left[None, :] < d), other=0.0)
        B = tl.load(rows + right[None, :], mask=inside & (right[None, :] < d), other=0.0)
        total = tl.dot(tl.trans(A), B, total)
    place = H + left[:, None].to(tl.int64) * h_stride + right[None, :]
    inside = (left[:, None] < d) & (right[None, :] < d)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def triton_gram_update(H: torch.Tensor, X: torch.Tensor) -> None:
    """See :func:`~epmq_gptq.kernels.gram.gram_update`; of half-precision rows, at most ``ROWS``.

    Tensor cores add up the products of these rows, and an fp32 addition takes over from them.
    """
    n, d = X.shape
    if X.stride(1) != 1:
        X = X.contiguous()
    tiles = triton.cdiv(d, _TILE)
    _gram_kernel[(tiles * (tiles + 1) // 2,)](
        X, H, n, d, X.stride(0), H.stride(0), TILE=_TILE, DEPTH=_DEPTH, num_warps=8, num_stages=3
    )
