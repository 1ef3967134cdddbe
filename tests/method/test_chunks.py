"""Lack of memory: products of fewer rows, and what is said in the end."""

import gc
import weakref

import pytest
import tiny
import torch

from epmq_gptq import EPMQConfig, EPMQDeviceError
from epmq_gptq.method.chunks import LEAST, device_error, given_up, in_halves, is_lost_device


@pytest.mark.parametrize("room", [1000, 100, LEAST])
def test_every_row_is_seen_once_and_in_order(room):
    seen, refused = [], []

    def step(X, Y):
        assert torch.equal(X, Y)
        if len(X) > room:
            refused.append(len(X))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.extend(X.tolist())

    rows = torch.arange(777)
    in_halves(step, rows, rows)
    assert seen == rows.tolist() and len(refused) < 10
    in_halves(step, rows[:0], rows[:0])


def test_too_little_room_for_the_smallest_product_is_one_error():
    def step(X):
        if len(X) > LEAST - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    with pytest.raises(EPMQDeviceError, match="2.50 GiB were asked for") as caught:
        in_halves(step, torch.arange(777))
    assert caught.value.code == "EPMQ-F46" and "`batch_size`" in caught.value.remedy


def test_other_errors_are_not_tried_again():
    calls = []

    def step(*values):
        calls.append(values)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        in_halves(step, torch.ones(9))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("text", "code", "device"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB.", "EPMQ-F46", "cuda:3"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
            "EPMQ-F46",
            "cuda:3",
        ),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2684354560 bytes.",)
        + ("EPMQ-F46", "cpu"),
        ("CUDA error: an illegal memory access was encountered", "EPMQ-F47", "cuda:3"),
    ],
)
def test_what_is_said_in_the_end(text, code, device):
    with pytest.raises(EPMQDeviceError, match=rf"^`m`: .*`{device}`") as caught:
        with given_up("`m`", "cuda:3"):
            raise RuntimeError(text)
    assert caught.value.code == code
    asked = "2.50 GiB" if "2.50" in text or "2684354560" in text else "an unknown number of bytes"
    assert code == "EPMQ-F47" or f"{asked} were asked for" in str(caught.value)
    assert not is_lost_device(caught.value)
    assert "an unknown number of bytes" in str(device_error(MemoryError(), "`m`", "cpu"))


def test_sums_go_when_they_are_used_up(tmp_path, monkeypatch):
    """Not when Python's collector comes by: a circle of references would keep gigabytes."""
    from epmq_gptq.host.processor import EPMQProcessor
    from epmq_gptq.method.statistics import GroupStatistics

    made, left = [], []
    init, end = GroupStatistics.__init__, EPMQProcessor.end_shared_input_capture

    def counted(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(weakref.ref(self))

    def ended(self, names):
        result = end(self, names)
        left.append(sum(one() is not None for one in made))
        return result

    monkeypatch.setattr(GroupStatistics, "__init__", counted)
    monkeypatch.setattr(EPMQProcessor, "end_shared_input_capture", ended)
    merged, experts = tiny.family(tmp_path, 2, model=tiny.llama(layers=1))
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts))
    gc.disable()
    try:
        model.quantize({name: tiny.rows(4, 16, seed=i) for i, name in enumerate(experts)})
    finally:
        gc.enable()
    # With chosen alphas an input has two of them.
    assert len(made) == 8 and left == [0] * 4
