"""What is planted elsewhere, by real means on a real GPU (`make test-gpu`)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from jobs import Job
from resume_runs import Run, assert_same, goes_on

from epmq_gptq import EPMQDeviceError
from epmq_gptq.method.chunks import forget_cached
from epmq_gptq.run_report import QuantizationReport

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(tiny, "DEVICE", "cuda")
    monkeypatch.setenv("EPMQ_TEST_DEVICE", "cuda")  # of child processes


# ---- memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_of(size: int) -> Iterator[None]:
    """Within: all of the GPU but so many bytes is taken, outside of torch's allocator.

    Not by `set_per_process_memory_fraction`, under which torch also collects its blocks in another
    way (`garbage_collection_threshold`) than it does where memory really is short.
    """
    forget_cached()
    torch.cuda.synchronize()
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    taken = ctypes.c_void_p()
    rest = torch.cuda.mem_get_info()[0] - size
    assert runtime.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(rest)) == 0
    try:
        yield
    finally:
        assert runtime.cudaFree(taken) == 0


def rows_weigh(folder: Path) -> Run:
    """A batch's activations are far larger than the layer: 84 MiB in the MLP, several times."""
    model = tiny.llama(2, 256, intermediate_size=2048)
    merged, experts = tiny.family(folder, 2, model=model)
    rows = {name: tiny.rows(90, 120, seed=index) for index, name in enumerate(experts)}
    return Run(folder, merged, experts, rows, alpha=0.1)


def weights_weigh(folder: Path) -> Run:
    """Grams and the rounding are far larger than the activations: 64 MiB are one Gram."""
    model = tiny.llama(1, 1024, intermediate_size=4096)
    merged, experts = tiny.family(folder, 2, model=model)
    rows = {name: tiny.rows(8, 120, seed=index) for index, name in enumerate(experts)}
    return Run(folder, merged, experts, rows, alpha=0.1)


def other_losses(report: QuantizationReport, whole: QuantizationReport) -> list[str]:
    """The layers that were not rounded as well: a code on an edge is a step of the loss."""
    return [
        f"{mine.module}: loss {mine.excess:.6g}, not {theirs.excess:.6g}"
        for mine, theirs in zip(report.modules, whole.modules, strict=True)
        if mine.excess != pytest.approx(theirs.excess, rel=0.05)
    ]


@pytest.mark.fault(
    "F46",
    injected="a real GPU on which 80, 60, 45, 30, 20 and 10 % of what the run takes at its peak "
    "are free: real failures of the allocator in forward passes, Grams, targets and roundings "
    "(only where the tests find a GPU)",
    outcome="the losses of a run with room, or error EPMQ-F46; then, with room again, the same "
    "process quantizes",
)
@pytest.mark.parametrize("family", [rows_weigh, weights_weigh])
def test_a_gpu_with_less_and_less_memory(family, tmp_path, record_property):
    run = family(tmp_path)
    options = dict(resume=None, batch_size=90)
    forget_cached()
    torch.cuda.reset_peak_memory_stats()
    whole = run.attempt(**options).epmq_report
    peak = torch.cuda.max_memory_allocated()
    record_property("peak", f"{peak / 2**20:.0f} MiB")
    ends: dict[int, list[str] | str] = {}  # all of them, for a GPU is not always at hand
    for percent in (80, 60, 45, 30, 20, 10):
        with memory_of(peak * percent // 100):
            try:
                report = run.attempt(**options).epmq_report
                ends[percent] = other_losses(report, whole)
            except EPMQDeviceError as error:
                assert error.code == "EPMQ-F46", error
                ends[percent] = str(error)
        record_property(f"{percent} %", str(ends[percent]))
    assert [percent for percent, end in ends.items() if isinstance(end, list) and end] == []
    again = run.attempt(**options).epmq_report
    assert other_losses(again, whole) == []


# ---- going on ------------------------------------------------------------------------------------


@pytest.fixture
def three_layers(tmp_path) -> tuple:
    """What a run and a job are made of."""
    merged, experts = tiny.family(tmp_path, 2, model=tiny.llama(layers=3))
    rows = {name: tiny.rows(6, 40, seed=index) for index, name in enumerate(experts)}
    return tmp_path, merged, experts, rows


@pytest.mark.fault(
    "F39",
    injected="a run on a real GPU that is broken off behind its first layer, and SIGKILL to "
    "another one in a forward pass, a rounding and a commit (only where the tests find a GPU)",
    outcome="equal tensors",
)
def test_a_run_on_a_gpu_goes_on(three_layers):
    goes_on(Run(*three_layers), "layers.1")
    job = Job(*three_layers)
    whole = job.whole()
    for phase, call in (("forward", 9), ("round", 10), ("commit", 2)):
        assert job.attempt(kill=(phase, call, 0.0)).returncode == -9
        assert job.told.read_text() == phase
    assert_same(job.finished(), whole)


@pytest.mark.fault(
    "F47",
    injected="a kernel that reads outside of its tensor in the second layer of a run on a real GPU "
    "(a device-side assert: CUDA answers nothing more to that process; only where the tests find a "
    "GPU)",
    outcome="error EPMQ-F47 and the process ends; the rerun goes on behind the last committed "
    "layer, with equal tensors",
)
def test_a_gpu_that_is_lost(three_layers):
    job = Job(*three_layers)
    lost = job.attempt(lose=("round", 10))
    assert lost.returncode == 1 and "EPMQDeviceError" in lost.stderr, lost.stderr[-3000:]
    assert "`cuda:0` does not answer any more" in lost.stderr
    resumed = job.finished()
    assert job.told.read_text() == "2"
    assert_same(resumed, job.whole())
