"""Where a checkpoint holds a layer, and which part of the tensor it is."""

from __future__ import annotations

import pytest
import torch

from epmq_gptq.experts.linears import Linear, StoredWeight, piece, resolve

STACK = StoredWeight("experts.gate_up_proj", index=2, part=1)
LINEAR = Linear(
    "experts.2.up_proj", (4, 3), ("experts.2.up_proj.weight", "old.w3.weight"), (STACK,)
)


def test_the_first_name_that_is_there_wins():
    everything = {"experts.gate_up_proj", "old.w3.weight", "experts.2.up_proj.weight"}
    assert resolve(LINEAR, everything) == StoredWeight("experts.2.up_proj.weight")
    assert resolve(LINEAR, everything - {"experts.2.up_proj.weight"}).tensor == "old.w3.weight"
    assert resolve(LINEAR, {"experts.gate_up_proj", "x"}) == STACK
    assert resolve(LINEAR, {"experts.2.gate_proj.weight"}) is None


@pytest.mark.parametrize("index", [None, 0, 2])
@pytest.mark.parametrize("part", [None, 0, 1])
def test_a_piece_is_a_view_and_its_shape_is_known_beforehand(index, part):
    whole = torch.arange(3 * 8 * 5.0).reshape(3, 8, 5)
    stored = StoredWeight("t", index, part)
    if index is None:
        whole = whole[0]
    got = piece(whole, stored)
    entry = whole if index is None else whole[index]
    rows = slice(None) if part is None else slice(4 * part, 4 * part + 4)
    assert torch.equal(got, entry[rows])
    assert got.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert piece(whole.shape, stored) == tuple(got.shape)


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((2, 8, 3), STACK),  # no entry 2
        ((3, 7, 3), STACK),  # an odd number of rows has no half
        ((7, 3), StoredWeight("t", part=0)),
        ((), STACK),
        ((8,), STACK),
    ],
)
def test_a_shape_without_such_a_piece_fits_no_layer(shape, stored):
    got = piece(shape, stored)
    assert got == () or 0 in got


def test_conv1d_is_stored_the_other_way_round():
    linear = Linear("c_attn", (64, 192), ("c_attn.weight",), transposed=True)
    assert (linear.outputs, linear.inputs) == (192, 64)
    assert (LINEAR.outputs, LINEAR.inputs) == (4, 3)
