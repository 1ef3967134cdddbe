"""``torch_block_update`` in Triton, equal to it bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rounding import WIDTH

_ROWS = 16
# Adding and subtracting it rounds an fp32 number below 2²² to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDED = tl.constexpr(4194304.0)


@triton.jit
def _block_kernel(
    work, hinv, scale, zero, column_group, quantized, errors, losses, maxq, rows,
    work_stride, hinv_row, hinv_column, scale_stride, zero_stride, q_stride, e_stride, l_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    row64 = row.to(tl.int64)
    place = work + row64[:, None] * work_stride + column[None, :]
    W = tl.load(place, mask=inside[:, None], other=0.0)
    for pivot in range(WIDTH):
        here = column[None, :] == pivot
        # One of the terms is not zero, so the sum is exact.
        w = tl.sum(tl.where(here, W, 0.0), axis=1)
        group = tl.load(column_group + pivot)
        s = tl.load(scale + group * scale_stride + row, mask=inside, other=1.0)
        z = tl.load(zero + group * zero_stride + row, mask=inside, other=0.0)
        d = tl.load(hinv + pivot * hinv_row + pivot * hinv_column)
        ratio = tl.div_rn(w, s)
        # Larger ones are clamped below, whatever they are rounded to.
        rounded = tl.where(tl.abs(ratio) < _ROUNDED, (ratio + _ROUNDER) - _ROUNDER, ratio)
        code = rounded + z
        # Comparisons and not minimum and maximum: a NaN stays one.
        code = tl.where(code < 0.0, 0.0, code)
        code = tl.where(code > maxq, maxq, code)
        q = s * (code - z)
        lost = w - q
        error = tl.div_rn(lost, d + tl.zeros_like(lost))
        loss = tl.div_rn(lost * lost, d * d + tl.zeros_like(lost))
        tl.store(quantized + row64 * q_stride + pivot, q, mask=inside)
        tl.store(errors + row64 * e_stride + pivot, error, mask=inside)
        tl.store(losses + row64 * l_stride + pivot, loss, mask=inside)
        h = tl.load(hinv + pivot * hinv_row + column * hinv_column)
        W = tl.where(column[None, :] >= pivot, W - error[:, None] * h[None, :], W)
    tl.store(place, W, mask=inside[:, None])


def triton_block_update(
    work: torch.Tensor,
    hinv: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    column_group: torch.Tensor,
    quantized: torch.Tensor,
    errors: torch.Tensor,
    losses: torch.Tensor,
    maxq: int,
) -> None:
    """See :func:`~epmq_gptq.kernels.rounding.torch_block_update`."""
    rows = work.shape[0]
    _block_kernel[(triton.cdiv(rows, _ROWS),)](
        work, hinv, scale, zero, column_group, quantized, errors, losses, float(maxq), rows,
        work.stride(0), hinv.stride(0), hinv.stride(1), scale.stride(0), zero.stride(0),
        quantized.stride(0), errors.stride(0), losses.stride(0),
        ROWS=_ROWS, WIDTH=WIDTH, num_warps=4,
        # A product and a sum in one step would round once where the host rounds twice.
        enable_fp_fusion=False,
    )  # fmt: skip
