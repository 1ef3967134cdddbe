"""Forward passes for which there is no room are run over fewer rows, and every row counts once."""

from __future__ import annotations

import warnings

import pytest
import torch
from little_room import full, in_pieces_as_whole, room_for
from test_architectures import FAMILIES
from test_resume import language
from torch import nn

from epmq_gptq import EPMQDeviceError
from epmq_gptq.experts.passes.row_pieces import (
    in_row_pieces,
    is_first_piece,
    of_whole_batch,
    whole_batches,
)

# ---- a layer -------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Two linear layers; the second one has room for some rows only."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, states, mask=None, pair=None, **options):
        hidden = self.first(states) * mask
        if len(states) > self.room:
            raise full()
        return self.second(hidden) + pair[0], hidden


@pytest.mark.parametrize("room", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_a_layer_in_pieces(room, rows):
    layer, forward = Layer(room), Layer.forward
    states, mask = torch.randn(rows, 4, 8), torch.randint(2, (rows, 4, 1))
    given, firsts = [], []

    def hook(module, arguments, output):
        firsts.append(is_first_piece())
        of_whole_batch(module, arguments[0], lambda X: given.append((module, X)))

    for linear in (layer.first, layer.second):
        linear.register_forward_hook(hook)
    pair = (torch.ones(1, 4, 8), None)
    with warnings.catch_warnings(record=True) as told, in_row_pieces([layer, layer]):
        output = layer(states, mask=mask, pair=pair)
    assert Layer.forward is forward
    half = -(-rows // 2)
    words = (
        f"a forward pass of {rows} rows found no memory (2.50 GiB were asked for): batches are run "
        f"{half} rows at a time from here on, or fewer. A `batch_size` of {half} is faster."
    )
    assert [words in str(one.message) for one in told] == [True] * (rows > room)
    hidden = layer.first(states) * mask
    torch.testing.assert_close(output, (layer.second(hidden) + 1, hidden))
    # Each hook has seen the whole batch, and once: the first one when it was tried whole.
    assert [module for module, _ in given[:2]] == [layer.first, layer.second]
    torch.testing.assert_close(given[0][1], states)
    torch.testing.assert_close(given[1][1], hidden)
    assert firsts[0] and (False in firsts) == (rows > room)


def test_a_layer_that_is_tried_whole_only():
    layer, states = Layer(2), torch.randn(5, 4, 8)
    options = dict(mask=torch.ones(5, 4, 1), pair=(torch.ones(1, 4, 8), None))
    with in_row_pieces([layer]):
        with whole_batches(), pytest.raises(torch.OutOfMemoryError):
            layer(states, **options)
        with pytest.warns(match="3 rows at a time"):
            layer(states, **options)
        with whole_batches():  # it is known by now that only pieces fit
            layer(states, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(cache=object()),  # may change as the layer runs
        dict(states=torch.randn(4, 4, 8)),  # which axis of others is that of the rows?
    ],
)
def test_a_layer_that_cannot_be_taken_apart(options):
    layer = Layer(2)
    given = dict(states=torch.randn(5, 4, 8), mask=torch.ones(1, 4, 1), pair=(0, 0)) | options
    with in_row_pieces([layer]), pytest.raises(torch.OutOfMemoryError):
        layer(**given)


def test_a_row_without_room_runs_on_the_cpu():
    """The layer is said to be on a device without room, where nothing can be computed here."""

    class Away(Layer):
        moves = ("meta",)

        def parameters(self, recurse=True):
            return [one.to(self.moves[-1]) for one in super().parameters(recurse)]

        def to(self, device):
            self.moves += (str(device),)
            self.room = 9 if self.moves[-1] == "cpu" else 0
            return self

    layer, states, given = Away(0), torch.randn(3, 4, 8), []
    layer.second.register_forward_hook(
        lambda module, arguments, output: of_whole_batch("second", arguments[0], given.append)
    )
    with in_row_pieces([layer]), pytest.warns(match="2 rows at a time"):
        written, hidden = layer(states, mask=torch.ones(3, 4, 1), pair=(1, None))
    assert layer.moves == ("meta", *("cpu", "meta") * 3)
    assert written.device.type == "meta" and written.shape == hidden.shape == states.shape
    torch.testing.assert_close(given, [layer.first(states)])


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "numbers"),
    [
        ("llama", "LlamaMLP", 2 * 50 * 64),
        ("llama", "LlamaAttention", 50 * 64),
        ("gemma", "GemmaMLP", 50 * 64),
        ("gpt2", "GPT2MLP", 50 * 64),
        ("opt", "ReLU", 2 * 50 * 128),
        ("mixtral", "LinearMixtralSparseMoeBlock", 50 * 64),
        # Some routed modules have counted the whole batch by then.
        ("mixtral", "MixtralBlockSparseTop2MLP", 70 * 64),
        ("qwen3_moe", "LinearQwen3MoeSparseMoeBlock", 2 * 50 * 64),
    ],
)
def test_a_run_in_pieces(tmp_path, family, kind, numbers):
    in_pieces_as_whole(language(tmp_path, FAMILIES[family]), numbers, kind)


def test_a_run_whose_rows_find_no_room_even_one_by_one(tmp_path):
    run = language(tmp_path)
    with room_for(40 * 64, "LlamaMLP"), pytest.raises(EPMQDeviceError) as caught:
        run.attempt(resume=None)
    assert caught.value.code == "EPMQ-F46" and "2.50 GiB were asked for" in caught.value.cause
