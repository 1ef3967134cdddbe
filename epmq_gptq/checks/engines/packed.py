"""What packed tensors say: bits and groups by their shapes, zero points and order by their content.

A GPTQ layer ``W: (N, K)`` of ``b`` bits is stored as ``qweight: (K·b/32, N)``,
``qzeros: (G, N·b/32)``, ``scales: (G, N)`` and ``g_idx: (K,)``, which says to which of the ``G``
groups an input belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

# What one packed linear layer consists of.
PACKED = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32
# Bits → the planes of `gptq_p`, lowest first (gptqmodel/utils/planar_packing.py).
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
# These have no other layout.
_ALWAYS_PLANES = (5, 6, 7)


class Shape(NamedTuple):
    """One packed layer, by its headers.

    Attributes:
        outputs, inputs: ``N`` and ``K``.
        bits: of a code.
        groups: ``G``.
    """

    outputs: int
    inputs: int
    bits: int
    groups: int


def shape_of(shapes: Mapping[str, tuple[int, ...]], claimed_bits: int) -> Shape | str:
    """The layer, or in what its tensors do not fit one another.

    Args:
        shapes: ``qweight``, ``qzeros``, ``scales`` and, where there is one, ``g_idx``.
        claimed_bits: what the configuration says; used where the shapes leave it open.
    """
    for part, rank in (("qweight", 2), ("qzeros", 2), ("scales", 2), ("g_idx", 1)):
        if part in shapes and len(shapes[part]) != rank:
            return f"`{part}` has {len(shapes[part])} axes, {rank} expected"
    rows, outputs = shapes["qweight"]
    groups, columns = shapes["qzeros"]
    if outputs == 0 or rows == 0 or groups == 0:
        return "it is empty"
    bits = claimed_bits
    if "g_idx" in shapes:
        inputs = shapes["g_idx"][0]
        if inputs == 0 or rows * WORD % inputs:
            return f"`qweight` has {rows} rows of words for the {inputs} inputs of `g_idx`"
        bits = rows * WORD // inputs
    elif columns * WORD % outputs == 0:
        bits = columns * WORD // outputs
    if not 1 <= bits <= 16:
        return f"`qweight` would have {bits} bits a weight"
    inputs = rows * WORD // bits
    if shapes["scales"] != (groups, outputs):
        return (
            f"`scales` is {_by(shapes['scales'])}, and {groups} groups (`qzeros`) of {outputs} "
            f"outputs (`qweight`) need {_by((groups, outputs))}"
        )
    if columns != -(-outputs * bits // WORD):
        return (
            f"`qzeros` is {_by(shapes['qzeros'])}, and {outputs} outputs of {bits} bits need "
            f"{-(-outputs * bits // WORD)} columns"
        )
    return Shape(outputs, inputs, bits, groups)


def group_size(shape: Shape, claimed: int) -> int:
    """The group size that ``G`` groups mean: the claimed one where it gives as many."""
    if claimed == -1 and shape.groups == 1:
        return -1
    if claimed > 0 and -(-shape.inputs // claimed) == shape.groups:
        return claimed
    return -1 if shape.groups == 1 else shape.inputs // shape.groups


def zero_kind(qzeros: torch.Tensor, bits: int, *, planes: bool) -> str:
    """``"v1"``, ``"v2"`` or ``"free"``, see :class:`~epmq_gptq.checks.engines.facts.Stored`.

    Args:
        qzeros: ``(G, N·bits/32)`` in int32.
        bits: of a code.
        planes: whether the format is ``gptq_p``.
    """
    middle = 1 << (bits - 1)
    # The last words may hold only some codes, in planes none that is whole.
    words = qzeros.shape[-1]
    stored = words // bits * WORD if _in_planes(bits, planes) else words * WORD // bits
    codes = unpacked(qzeros, bits, planes=planes)[..., :stored]
    if not codes.numel():
        return "free"
    lowest, highest = codes.aminmax()
    kinds = {middle - 1: "v1", middle: "v2"}
    return kinds.get(int(lowest), "free") if lowest == highest else "free"


def _in_planes(bits: int, planes: bool) -> bool:
    return bits in _ALWAYS_PLANES or (planes and bits in _PLANES)


def unpacked(words: torch.Tensor, bits: int, *, planes: bool) -> torch.Tensor:
    """The codes of packed words, ``(..., n)`` int32 → ``(..., 32·⌈n/bits⌉)`` int64.

    Args:
        words: 32 codes lie in ``bits`` words, one after the other or in planes.
        bits: of a code.
        planes: whether the format is ``gptq_p``.
    """
    lacking = -words.shape[-1] % bits
    blocks = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, lacking))
    blocks = blocks.unflatten(-1, (-1, bits))
    codes = blocks.new_zeros(*blocks.shape[:-1], WORD)
    at = offset = 0
    for width in _PLANES[bits] if _in_planes(bits, planes) else (bits,):
        position = at + width * torch.arange(WORD)
        word, shift = position // WORD, position % WORD
        # A code may end in the next word. Where it does not, that word's bits lie above the mask.
        following = (word + 1).clamp(max=bits - 1)
        field = blocks[..., word] >> shift | blocks[..., following] << (WORD - shift)
        codes |= (field & ((1 << width) - 1)) << offset
        at += WORD * width
        offset += width
    return codes.flatten(-2)


def dequantized_rows(
    parts: Mapping[str, torch.Tensor], rows: Sequence[int], shape: Shape, format: str
) -> torch.Tensor:
    """Some rows of ``W``, ``(len(rows), K)`` fp32, from the definition of the format.

    Args:
        parts: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
        rows: outputs.
        shape: of the layer.
        format: ``"gptq"``, ``"gptq_v2"`` or ``"gptq_p"``.
    """
    rows, planes = list(rows), format == "gptq_p"
    codes = unpacked(parts["qweight"][:, rows].T, shape.bits, planes=planes)[:, : shape.inputs]
    zeros = unpacked(parts["qzeros"], shape.bits, planes=planes)[:, rows]  # (G, rows)
    if format == "gptq":
        zeros = (zeros + 1) & ((1 << shape.bits) - 1)
    groups = parts["g_idx"].long()
    return (codes - zeros[groups].T).float() * parts["scales"][:, rows].float()[groups].T


def is_plain_order(g_idx: torch.Tensor, group_size: int) -> bool:
    """Whether input ``k`` belongs to group ``k // group_size``, as engines take for granted.

    Some write zeros where there is one group for all inputs.
    """
    if group_size == -1:
        return bool((g_idx == g_idx[0]).all())
    plain = torch.arange(len(g_idx), dtype=g_idx.dtype) // group_size
    return torch.equal(g_idx, plain)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
