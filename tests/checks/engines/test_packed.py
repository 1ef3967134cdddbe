"""Zero points and order of packed tensors, against GPTQModel's own packing."""

from __future__ import annotations

import pytest
import torch
from gptqmodel.utils.planar_packing import planar_pack_cols

from epmq_gptq.checks.engines.packed import (
    group_size,
    is_plain_order,
    shape_of,
    unpacked,
    zero_kind,
)


def fields(values: torch.Tensor, bits: int) -> torch.Tensor:
    """One code after another, lowest bits first, across words: the layout of 2, 3, 4 and 8 bits."""
    rows = []
    for row in values.tolist():
        packed = sum(value << bits * index for index, value in enumerate(row))
        words = [packed >> 32 * index & 0xFFFFFFFF for index in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("planes", [False, True])
def test_zero_points_by_version(bits, planes):
    if bits in (5, 6, 7) and not planes:
        pytest.skip("these exist in planes only")
    pack = planar_pack_cols if planes else fields
    middle = 1 << (bits - 1)
    for value, kind in ((middle - 1, "v1"), (middle, "v2"), (middle + 1, "free")):
        zeros = torch.full((3, 64), value % (1 << bits), dtype=torch.int32)
        assert zero_kind(pack(zeros, bits), bits, planes=planes) == kind
    zeros = torch.full((3, 64), middle, dtype=torch.int32)
    zeros[2, 63] -= 1
    assert zero_kind(pack(zeros, bits), bits, planes=planes) == "free"


def test_outputs_that_are_no_multiple_of_32():
    zeros = torch.full((1, 40), 7, dtype=torch.int32)
    assert zero_kind(fields(zeros, 4), 4, planes=False) == "v1"


@pytest.mark.parametrize(
    ("order", "size", "plain"),
    [
        ([0, 0, 1, 1], 2, True),
        ([0, 1, 0, 1], 2, False),
        ([0, 0, 0, 0], -1, True),
        ([0, 0, 1, 1], -1, False),
        ([0, 0, 0, 1], 3, True),
    ],
)
def test_order(order, size, plain):
    assert is_plain_order(torch.tensor(order, dtype=torch.int32), size) is plain


def shapes(**changes):
    return {"qweight": (16, 64), "qzeros": (4, 8), "scales": (4, 64), "g_idx": (128,)} | changes


def test_shapes():
    assert tuple(shape_of(shapes(), 8)) == (64, 128, 4, 4)  # bits are counted
    without = {part: shape for part, shape in shapes().items() if part != "g_idx"}
    assert tuple(shape_of(without, 8)) == (64, 128, 4, 4)
    three = {"qweight": (12, 64), "qzeros": (4, 6), "scales": (4, 64), "g_idx": (128,)}
    assert shape_of(three, 4).bits == 3
    for wrong in (
        shapes(g_idx=(100,)),
        shapes(scales=(4, 63)),
        shapes(scales=(5, 64)),
        shapes(qzeros=(4, 9)),
        shapes(qweight=(0, 64)),
        shapes(qweight=(16, 64, 1)),
        shapes(g_idx=(16 * 32,)),
    ):
        assert isinstance(shape_of(wrong, 4), str)


@pytest.mark.parametrize(
    ("groups", "claimed", "size"),
    [(4, 32, 32), (4, 64, 32), (1, -1, -1), (1, 128, 128), (1, 64, -1), (3, 48, 48), (4, -1, 32)],
)
def test_group_sizes(groups, claimed, size):
    shape = shape_of(shapes(qzeros=(groups, 8), scales=(groups, 64)), 4)
    assert group_size(shape, claimed) == size


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("planes", [False, True])
def test_packed_words_are_taken_apart(bits, planes):
    pack = planar_pack_cols if planes or bits in (5, 6, 7) else fields
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (3, 64), generator=random, dtype=torch.int32)
    assert torch.equal(unpacked(pack(codes, bits), bits, planes=planes), codes.long())


def test_words_that_are_no_whole_block():
    codes = torch.arange(40, dtype=torch.int32).expand(2, -1) % 16
    assert torch.equal(unpacked(fields(codes, 4), 4, planes=False)[:, :40], codes.long())
