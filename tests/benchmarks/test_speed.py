"""The speed benchmark: its gate, its order, and what it says of figures that are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from speed import tables, worker
from speed.cases import Case, config_of

from epmq_gptq.io.phases import exact_phases

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def command():
    """benchmarks/speed.py, whose name its package has."""
    spec = importlib.util.spec_from_file_location("speed_command", ROOT / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASE = Case("llama-256", 2, 2048)


def figures(seconds, peak=2_000_000_000, **phases):
    return {
        "seconds": seconds,
        "peak": {"process": peak},
        "before": {"process": 500_000_000},
        "phases": phases,
        "losses": {"0.q": 1.0},
    }


def test_quantizers_share_grid_and_damping(tmp_path):
    gptq, fast, paper, best = (
        config_of(name, tmp_path, ["a", "b"]) for name in ("gptq", "fast", "paper", "best")
    )
    assert {(c.bits, c.group_size) for c in (gptq, fast, paper, best)} == {(4, 128)}
    assert gptq.damp_percent == fast.alpha == paper.alpha == 0.05 and best.alpha == "auto"
    assert list(fast.experts) == ["merge"] and list(paper.experts) == ["a", "b"]
    assert (paper.eta, paper.rho) == (0, 0) and (best.eta, best.rho) == (1, 1)


def test_rounds_run_forth_and_back_and_ratios_are_of_one_round(command, tmp_path, monkeypatch):
    order = []
    seconds = {"gptq": iter([10.0, 20.0]), "paper": iter([11.0, 30.0])}

    def run(case, name, folder):
        order.append(name)
        return figures(next(seconds[name]))

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "build", lambda case, folder: None)
    runs = command.measured({CASE: ("gptq", "paper")}, 2, tmp_path)
    assert order == ["gptq", "paper", "paper", "gptq"]
    assert tables.ratios(runs[CASE], "paper", "gptq") == [1.1, 1.5]
    line = next(li for li in tables.ratio_table(runs).splitlines() if "| paper |" in li)
    assert line == "| llama-256 | 2 | 2,048 | warm | paper | 20.5 | 1.18 | 1.30 | 1.42 |  |"


@pytest.mark.parametrize(("loss", "passes"), [(1.009, True), (1.011, False)])
def test_the_parity_gate(loss, passes, command, tmp_path, monkeypatch):
    found = {"gptq": figures(1.0), "fast": figures(1.0) | {"losses": {"0.q": loss}}}
    monkeypatch.setattr(command, "run", lambda case, name, folder: found[name])
    monkeypatch.setattr(command, "build", lambda case, folder: None)
    if passes:
        assert command.parity(tmp_path) == pytest.approx(0.009, rel=1e-3)
    else:
        with pytest.raises(SystemExit, match="parity gate: `0.q` has loss 1.011, the host 1.0"):
            command.parity(tmp_path)
    found["fast"]["losses"] = {}
    with pytest.raises(SystemExit, match="parity gate: layers"):
        command.parity(tmp_path)


def test_tables_and_chart_of_known_figures(tmp_path):
    runs = {
        Case("llama-256", K, 2048): {
            "gptq": [figures(10.0)],
            "fast": [figures(8.0, forward=3.0)],
            "paper": [figures(10.0 + K, peak=2_500_000_000, forward=3.0, fold=0.25)],
        }
        for K in (2, 8)
    }
    runs[Case("llama-256", 8, 2048, cold=True)] = {"paper": [figures(25.0)]}
    text = tables.ratio_table(runs)
    assert "| llama-256 | 8 | 2,048 | warm | paper | 18.0 | 1.80 | 1.80 | 1.80 | 2.25 |" in text
    assert "| llama-256 | 8 | 2,048 | cold | paper | 25.0 | 2.50 | 2.50 | 2.50 | 3.12 |" in text
    header, rule, *lines = tables.phase_table(runs).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in (header, rule, *lines)} == {16}
    assert "| 2 | 2,048 | paper | 3.00 | 0.00 | 0.00 | 0.00 | 0.25 |" in "\n".join(lines)
    assert "| llama-256 | 2 | 2,048 | paper | 2,500 | 2,000 |" in tables.memory_table(runs)
    files = [tmp_path / name for name in ("one.svg", "other.svg")]
    for file in files:
        tables.chart(runs, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "llama-256" in files[0].read_text() or "<path" in files[0].read_text()


def test_one_real_run_of_each_quantizer_ends_in_figures(command, tmp_path):
    """One as the command does it, in a process of its own; two as the worker does it there."""
    command.build(CASE, tmp_path)
    found = {"best": command.run(CASE, "best", tmp_path)}
    for name in ("gptq", "fast"):
        with exact_phases():
            found[name] = worker.run(CASE, name, tmp_path)
    assert all(one["seconds"] > 0 for one in found.values())
    assert all(one["peak"]["process"] >= one["before"]["process"] > 0 for one in found.values())
    assert found["best"]["phases"]["expert_forward"] > 0
    assert "expert_forward" not in found["fast"]["phases"]
    assert len(found["gptq"]["losses"]) == len(found["fast"]["losses"]) == 14
