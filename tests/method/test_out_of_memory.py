"""Lack of memory: what is tried again, in which parts, and what is said in the end."""

import gc
import threading
import weakref

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from epmq_gptq import EPMQConfig, EPMQDeviceError
from epmq_gptq.method.chunks import (
    LEAST,
    Rooms,
    add_on_cpu,
    device_error,
    devices_of,
    given_up,
    in_halves,
    is_lost_device,
    made_on,
    on_cpu,
    with_room,
)
from epmq_gptq.method.statistics import Moments


@pytest.mark.parametrize("room", [1000, 100, LEAST, LEAST - 1])
def test_every_row_is_seen_once_and_in_order(room):
    seen, refused, on_the_cpu = [], [], []

    def step(X, Y):
        assert torch.equal(X, Y)
        if len(X) > room:
            refused.append(len(X))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.extend(X.tolist())

    def otherwise(X, Y):
        on_the_cpu.append(len(X))
        seen.extend(X.tolist())

    rows = torch.arange(777)
    in_halves(step, rows, rows, otherwise=otherwise)
    assert seen == rows.tolist()
    assert bool(on_the_cpu) == (room < LEAST)
    assert len(refused) < 10 or room < LEAST
    in_halves(step, rows[:0], rows[:0], otherwise=otherwise)


def test_other_errors_are_not_tried_again():
    calls = []

    def step(*values):
        calls.append(values)
        raise ValueError("a bug")

    for run in (lambda: with_room(step), lambda: in_halves(step, torch.ones(9), otherwise=step)):
        with pytest.raises(ValueError, match="a bug"):
            run()
    assert len(calls) == 2


def test_what_is_moved_keeps_its_shape():
    H = torch.ones(2, 2)
    moved = on_cpu({"a": [Moments(H, None)], "b": (H, 3)})
    assert isinstance(moved["a"][0], Moments) and moved["a"][0].D is None
    assert torch.equal(moved["b"][0], H) and moved["b"][1] == 3


def test_what_lies_on_several_devices_meets_on_the_cpu():
    """Fake tensors know their devices without there being a GPU, and refuse to be mixed."""
    with FakeTensorMode():
        on_gpu, here = torch.empty(2, 2, device="cuda"), torch.empty(2, 2)
        with pytest.raises(FakeTensorDeviceMismatchError):
            torch.mm(on_gpu, here)
        assert devices_of([on_gpu, {"a": (here, None)}]) == {on_gpu.device, here.device}
        assert with_room(torch.mm, on_gpu, on_gpu).device == on_gpu.device
        assert with_room(torch.mm, on_gpu, here).device == here.device
        moved = on_cpu([on_gpu, (on_gpu, here)])
        assert moved[0] is moved[1][0] and devices_of(moved) == {here.device}


def test_what_a_device_has_no_room_for_is_made_on_the_cpu():
    asked = []

    def make(device):
        asked.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.ones(2)

    assert made_on(torch.device("cuda"), make).device.type == "cpu"
    assert asked == ["cuda", "cpu"]


def test_a_product_on_the_cpu():
    C, L, R = torch.ones(600, 7), torch.randn(9, 600), torch.randn(9, 7)
    add_on_cpu(C, L.half(), R, 0.5)
    torch.testing.assert_close(C, 1 + L.half().float().T @ R / 2)


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


def test_rooms_let_as_many_in_as_fit():
    rooms, entered = Rooms(lambda device: (10, 100)), threading.Event()

    def third():
        with rooms.of("cuda:0", 4):
            entered.set()

    with rooms.of("cuda:0", 4) as first, rooms.of("cuda:0", 6) as second:
        thread = threading.Thread(target=third)
        thread.start()
        assert first and second and not entered.wait(0.05)
        with rooms.of("cuda:1", 99) as other, rooms.of("cpu", 99) as cpu:
            assert cpu and not other
    thread.join(10)
    assert entered.is_set()


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
