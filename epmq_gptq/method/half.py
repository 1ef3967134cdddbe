"""Grams and D in half precision, and back; pure maths.

A Gram is stored as its channels' norms, in fp32, and the upper triangle of what is left when both
sides are divided by them (cosines, between -1 and 1), in fp16; D likewise, with one more factor per
output. What is lost costs less than 1e-4 of what the target gains over the merge, down to an alpha
of 1e-3 (tests/host/recorded/test_half.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PackedGram(NamedTuple):
    """``H: (d, d)``, symmetric.

    Attributes:
        norms: ``(d,)`` fp32, square roots of the diagonal.
        cosines: ``(d (d − 1) / 2,)`` fp16, row after row above the diagonal.
    """

    norms: torch.Tensor
    cosines: torch.Tensor


def pack_gram(H: torch.Tensor) -> PackedGram:
    """``H: (d, d)`` fp32, on any device; the packed one is on the CPU."""
    d = H.shape[0]
    norms = H.diagonal().clamp_min(0).sqrt()
    inverse = _inverse(norms)
    cosines = torch.empty(d * (d - 1) // 2, dtype=torch.float16)
    start = 0
    for row in range(d - 1):
        stop = start + d - 1 - row
        part = H[row, row + 1 :] * inverse[row + 1 :] * inverse[row]
        cosines[start:stop] = part.to(torch.float16)
        start = stop
    return PackedGram(norms.cpu(), cosines)


def unpack_gram(packed: PackedGram, device: torch.device | str = "cpu") -> torch.Tensor:
    """``H: (d, d)`` fp32."""
    norms = packed.norms.to(device)
    cosines = packed.cosines.to(device)
    d = len(norms)
    H = torch.empty(d, d, device=device)
    start = 0
    for row in range(d):
        stop = start + d - 1 - row
        part = cosines[start:stop].to(torch.float32) * norms[row + 1 :] * norms[row]
        H[row, row + 1 :] = part
        H[row + 1 :, row] = part
        H[row, row] = norms[row] * norms[row]
        start = stop
    return H


class PackedDelta(NamedTuple):
    """``D: (out, d)`` of an input with given channel norms.

    Attributes:
        sizes: ``(out,)`` fp32, the largest entry of each row over its channel's norm.
        values: ``(out, d)`` fp16, between -1 and 1.
    """

    sizes: torch.Tensor
    values: torch.Tensor


def pack_delta(D: torch.Tensor, norms: torch.Tensor) -> PackedDelta:
    """``D: (out, d)`` fp32, ``norms: (d,)`` as :class:`PackedGram` has them."""
    values = D * _inverse(norms.to(D.device))
    sizes = values.abs().amax(1)
    values *= _inverse(sizes)[:, None]
    return PackedDelta(sizes.cpu(), values.to(torch.float16).cpu())


def unpack_delta(
    packed: PackedDelta, norms: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """``D: (out, d)`` fp32."""
    D = packed.values.to(device).to(torch.float32)
    D *= packed.sizes.to(device)[:, None]
    return D.mul_(norms.to(device))


def packed_bytes(columns: int, outputs: list[int]) -> int:
    """Of one expert's sums over one input: its Gram, and D of layers with so many outputs."""
    gram = columns * (columns - 1) + 4 * columns
    return gram + sum(out * (2 * columns + 4) for out in outputs)


def _inverse(sizes: torch.Tensor) -> torch.Tensor:
    """One over what is not zero; there all entries are zero as well."""
    return torch.where(sizes > 0, 1 / sizes, torch.zeros_like(sizes))
