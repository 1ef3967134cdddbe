"""The rounding of 128 columns of a weight, column by column, as GPTQ does it.

GPTQModel has it as a loop of torch operations and as a CUDA kernel that ``nvcc`` must compile; this
is the same operation for machines with Triton and without ``nvcc``.
"""

from __future__ import annotations

import functools

import torch

from .exact import has_triton

WIDTH = 128


def torch_block_update(
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
    """Round the columns of ``work`` in order, and move what each loses to those after it.

    The arguments are those of the host's kernel; all fp32 but ``column_group``.

    Args:
        work: ``(out, 128)``, rounded and destroyed.
        hinv: ``(128, 128)`` the block of U, UᵀU = H⁻¹.
        scale, zero: ``(groups, out)``.
        column_group: ``(128,)`` int32, which of the groups a column is of.
        quantized: ``(out, 128)`` gets the rounded weight.
        errors: ``(out, 128)`` gets what is lost, over the diagonal of ``hinv``.
        losses: ``(out, 128)`` gets the square of that.
        maxq: the largest code.
    """
    for i in range(work.shape[1]):
        w, d, group = work[:, i], hinv[i, i], int(column_group[i])
        code = torch.clamp(torch.round(w / scale[group]) + zero[group], 0, maxq)
        q = scale[group] * (code - zero[group])
        quantized[:, i] = q
        lost = w - q
        losses[:, i] = lost.square() / d.square()
        errors[:, i] = lost / d
        work[:, i:] -= errors[:, i, None] * hinv[i, i:]


@functools.cache
def triton_rounds(device: torch.device) -> bool:
    """Whether Triton's version gives the bits of :func:`torch_block_update` on this device."""
    if not has_triton():
        return False
    try:
        from .rounding_triton import triton_block_update

        return blocks_agree(triton_block_update, device)
    except Exception:  # no compiler, no such GPU: the host's loop does it
        return False


def blocks_agree(update, device: torch.device | str, rows: int = 200) -> bool:
    """Whether ``update`` rounds a block as :func:`torch_block_update` does, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    work = torch.randn(rows, WIDTH, generator=generator)
    X = torch.randn(2 * WIDTH, WIDTH, generator=generator)
    inverse = torch.linalg.inv(X.T @ X / len(X))
    hinv = torch.linalg.cholesky(inverse, upper=True)
    scale = torch.rand(4, rows, generator=generator) * 0.3 + 0.05
    zero = torch.randint(0, 16, (4, rows), generator=generator).float()
    column_group = torch.arange(WIDTH, dtype=torch.int32) // 32
    results = []
    for one in (torch_block_update, update):
        given = [t.to(device).clone() for t in (work, hinv, scale, zero, column_group)]
        out = [torch.zeros(rows, WIDTH, device=device) for _ in range(3)]
        one(*given, *out, 15)
        results.append([given[0], *out])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))
