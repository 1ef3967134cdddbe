"""Seconds by phase: each is counted once, whatever lies within what."""

from __future__ import annotations

import json
import threading
import time

import pytest
import tiny
import torch

from epmq_gptq import EPMQConfig
from epmq_gptq.io import phases
from epmq_gptq.io.phases import PHASES, Phases, peak_memory


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def go(seconds):
        now[0] += seconds

    return go


def test_an_inner_phase_takes_its_seconds_from_the_outer_one(clock):
    spent = Phases()
    with spent.measure("solve"):
        clock(1)
        with spent.measure("fold"):
            clock(10)
            with spent.measure("expert_reading"):
                clock(100)
        with spent.measure("alpha"):
            clock(1000)
        clock(5)
    assert spent.seconds == {"expert_reading": 100, "fold": 10, "alpha": 1000, "solve": 6}


def test_a_phase_that_raises_is_counted_and_leaves_the_outer_one_right(clock):
    spent = Phases()
    with spent.measure("solve"):
        with pytest.raises(ValueError), spent.measure("fold"):
            clock(3)
            raise ValueError
        clock(4)
    assert spent.seconds == {"fold": 3, "solve": 4}


def test_threads_are_counted_apart():
    spent = Phases()
    inside, done = threading.Event(), threading.Event()

    def work():
        with spent.measure("round"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=work)
    with spent.measure("solve"):
        thread.start()
        inside.wait(10)
    done.set()
    thread.join()
    assert set(spent.seconds) == {"round", "solve"} and min(spent.seconds.values()) > 0


def test_hooks_are_no_part_of_the_hosts_forward_passes(clock):
    spent = Phases()
    with spent.in_hook("gram"):
        clock(2)
        with spent.measure("fold"):
            clock(3)
    host = {
        name: {"total": seconds}
        for name, seconds in {
            "capture_inputs": 1.0,
            "pre_quant_forward": 10.0,
            "post_quant_forward": 4.0,
            "submodule_finalize": 0.5,
        }.items()
    }
    found = spent.result(20.0, host)
    assert found == {"forward": 10.0, "gram": 2, "fold": 3, "pack": 0.5, "waiting": 4.5}
    assert [name for name in PHASES if name in found] == list(found)


def test_a_run_reports_phases_that_fill_its_time(tmp_path):
    merged, experts = tiny.family(tmp_path, 2)
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts))
    rows = {name: tiny.rows(4, 16, seed=i) for i, name in enumerate(experts)}
    report = model.quantize(rows, batch_size=2)["epmq"]
    assert list(report.phases) == [name for name in PHASES if name != "commit"]
    assert all(seconds >= 0 for seconds in report.phases.values())
    assert min(report.phases[name] for name in ("forward", "gram", "fold", "solve", "round")) > 0
    # More than the wall time only where threads ran at once; what no phase names is waiting.
    assert sum(report.phases.values()) >= 0.999 * report.seconds
    assert report.peak_memory["process"] == peak_memory()["process"] > 10**8
    profile = json.loads(json.dumps(report.profile()))
    assert profile["phases"] == report.phases and profile["experts"] == 2
    assert profile["tokens"] == sum(report.tokens.values())


def test_only_a_profile_waits_for_the_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(phases.torch.cuda, "synchronize", waited.append)
    with Phases("cuda").measure("solve"):
        pass
    assert not waited
    with phases.exact_phases():
        spent = Phases("cuda")
    with spent.measure("solve"):
        pass
    assert len(waited) == 2
    assert phases.Phases("cuda")._device is None


def test_memory_of_a_phase_is_the_most_that_was_held_at_an_end_of_it():
    spent = Phases()
    before = peak_memory()["process"]
    with spent.measure("solve"):
        held = torch.ones(32 << 20)  # 128 MB, touched
    with spent.measure("round"):
        pass
    assert spent.memory["solve"] >= 128 << 20
    del held
    with spent.measure("solve"):
        pass
    # The first end of it held more, and stays.
    assert spent.memory["solve"] >= spent.memory["round"] - (8 << 20)
    assert spent.memory["solve"] <= max(before, peak_memory()["process"]) + (8 << 20)
    with spent.in_hook("gram"):
        pass
    assert set(spent.memory) == {"solve", "round", "gram", "forward"}
