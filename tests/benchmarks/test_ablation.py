"""The ablation's tables, from figures that are known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from quality import plan as plans
from quality.ablation import (
    BITS,
    CANDIDATES,
    GPTQ,
    HIGH,
    LOW,
    PAPER_ROW,
    REGMEAN,
    Ablation,
    AblationPlan,
    default_variant,
)

from epmq_gptq.config import PROFILES

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1)


@pytest.fixture
def plan():
    return AblationPlan(
        plans.Options(suites=("text4",), mergers=("average", "ties"), seeds=SEEDS, bits=(4, 3))
    )


def accuracy(cell):
    """Merged 40, experts 80; the default gains 16 + 2 per seed, the paper 2, RegMean++ 6."""
    if cell.kind == "experts":
        return 80.0
    if cell.kind == "merge":
        return 40.0
    if cell.kind == "base":
        return 20.0
    if cell.method == "GPTQ":
        if cell.merger == "regmean_plusplus":
            return 46.0
        return {BITS: 39.0, LOW: 36.0, HIGH: 40.0}[cell.bits]
    if cell.variant == default_variant():
        return 56.0 + 2 * cell.seed if cell.bits == BITS else 39.0
    return 42.0


def results(plan):
    """Two tasks whose mean is that."""
    return {
        name: {
            "scores": {
                "evaluation": {
                    task: {"accuracy": accuracy(cell) + off, "loss": 1.0, "items": 10}
                    for task, off in (("one", -1), ("two", 1))
                }
            }
        }
        for name, cell in plan.cells.items()
        if cell.kind != "suite"
    }


def test_every_row_has_its_cells(plan):
    made = Ablation(plan, results(plan))
    for row in made.rows:
        for merger in made.mergers:
            for seed in SEEDS:
                assert made.score(row, "text4", seed, merger) is not None, row
    labels = [label for label, bits in made.rows if bits == BITS]
    assert labels == [GPTQ, PAPER_ROW, *plans.VARIANTS, REGMEAN]


def test_recovery_is_the_share_of_what_merging_lost(plan):
    made = Ablation(plan, results(plan))
    row = (made.best, BITS)
    assert made.recovery(row, "text4", 0, "average") == pytest.approx(40)
    assert made.over_mergers(row, "text4", 1) == pytest.approx(45)
    assert made.recovery((GPTQ, BITS), "text4", 0, "ties") == pytest.approx(-2.5)
    assert made.recovery((REGMEAN, BITS), "text4", 0, "ties") == pytest.approx(15)
    assert f"| **{made.best} (the default)** | 4 | 42.5 ± 3.5 |" in made.summary()


def test_goals_say_what_is_reached_and_by_how_much_it_is_not(plan):
    lines = Ablation(plan, results(plan)).goals().splitlines()
    found = {cells[2].strip(): cells[3:6] for line in lines[4:] for cells in [line.split("|")]}
    found = {label: [cell.strip() for cell in cells] for label, cells in found.items()}
    assert found["twice the paper's recovery"] == ["42.5", "10.0", "yes"]
    assert found["the paper's + 20 points"] == ["42.5", "25.0", "yes"]
    assert found[f"{REGMEAN} + 10 points"] == ["42.5", "25.0", "yes"]
    # 57 on average against 39, less the spread of 1.4.
    assert found["GPTQ of Simple averaging, less the spread"][1:] == ["37.6", "yes"]
    name = "8-bit GPTQ of TIES (0.3), with 3 bits"
    assert found[name] == ["39.0", "40.0", "no, by 1.0"]


def test_a_cell_that_failed_leaves_its_figures_out(plan):
    known = results(plan)
    failed = next(n for n, c in plan.cells.items() if c.variant == default_variant())
    known[failed] = {"error": {"type": "X", "message": "y"}}
    made = Ablation(plan, known)
    assert made.recovery((made.best, BITS), "text4", 0, "average") is None
    assert made.markdown()


def test_the_default_profile_is_one_of_the_rows():
    options = plans.VARIANTS[default_variant()]
    assert default_variant() in CANDIDATES
    best = PROFILES["best"]
    assert {name: options[name] for name in best._fields} == best._asdict()


def test_tables_can_be_written_anew_without_a_run(plan, tmp_path, monkeypatch):
    place = ROOT / "benchmarks/ablation.py"
    spec = importlib.util.spec_from_file_location("ablation_script", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = {
        "command": "python benchmarks/ablation.py",
        "seconds": 60.0,
        "versions": {"torch": "1"},
        "hardware": {"cpu": "x", "cores": 2, "threads": "2 workers of 1", "gpus": []},
        "cells": results(plan),
    }
    (tmp_path / "ablation.json").write_text(json.dumps(record))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- quality:ablation -->\nold\n<!-- /quality:ablation -->\nz\n")
    arguments = ["--render", "--out", str(tmp_path), "--suite", "text4", "--seeds", "0,1"]
    arguments += ["--mergers", "average,ties", "--refresh", str(readme)]
    assert script.main(arguments) == 0
    text = (tmp_path / "ablation.md").read_text()
    assert "`python benchmarks/ablation.py`: 1 minutes, x, 2 cores" in text
    assert "42.5 ± 3.5" in text and "42.5 ± 3.5" in readme.read_text()
    assert "old" not in readme.read_text() and readme.read_text().endswith("z\n")
    assert "E-PMQ" in (tmp_path / "ablation.csv").read_text()
