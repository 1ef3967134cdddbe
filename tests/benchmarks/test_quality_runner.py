"""The plan, its order, choices, failures, resuming and the tables; workers run a stand-in."""

import csv
import io
import json

import pytest
import standin_cells
from quality import plan as plans
from quality.runner import Runner
from quality.tables import Tables, csv_of


def planned(**options):
    return plans.Plan(plans.Options(suites=("text4",), **options))


def run(plan, work, **options):
    lines = []
    options = {"function": standin_cells.figures, "decided_by": {"code": "1"}} | options
    runner = Runner(plan, work, workers=2, say=lines.append, **options)
    work.mkdir(exist_ok=True)
    return runner.run(), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    plan = planned(mergers=("average", "task_arithmetic", "ties", "regmean_plusplus"))
    return plan, *run(plan, work), work


def test_every_need_is_a_cell_and_comes_first():
    plan = planned()
    seen = set()
    for name in plan.cells:
        missing = set(plan.needs[name]) - seen
        # An alpha of the paper may be needed by a choice before it is listed, never the reverse.
        assert all(plan.cells[need].kind in ("quantize", "merge") for need in missing)
        assert set(plan.needs[name]) <= set(plan.cells)
        seen.add(name)
    epmq = [c for c in plan.cells.values() if c.method == "E-PMQ" and c.choice is None]
    best = [c for c in epmq if c.variant]
    assert {(c.merger, c.bits) for c in best} == {
        (merger, bits)
        for merger in plan.options.mergers
        for bits in (4, 3)
        if merger in plans.MERGERS
    }
    epmq = [c for c in epmq if not c.variant]
    assert {c.alpha for c in epmq if c.bits == 4 and c.merger == "average"} == {
        0.01, 0.1, 1.0, 10.0,
    }  # fmt: skip
    assert {c.bits for c in epmq if c.merger == "ties"} == {3, 4, 5, 6, 7, 8}
    assert sum(c.exclusive for c in plan.cells.values()) == 3  # 64, 128 and 256 rows


def test_a_choice_looks_at_held_out_rows_alone(finished):
    plan, results, _, _ = finished
    for name, cell in plan.cells.items():
        if cell.choice == "alpha":
            # On the rows that are shown alpha 10 would win: 60 %.
            assert results[name]["chosen"] == 1.0
            assert results[name]["scores"]["evaluation"]["a"]["accuracy"] == 51
        elif cell.choice == "gamma" and cell.kind == "merge":
            assert results[name]["chosen"] == 0.5


def test_failures_stay_in_their_cells(finished):
    plan, results, lines, _ = finished
    assert set(results) == set(plan.cells) and len(lines) == len(plan.cells)
    states = {}
    for name, cell in plan.cells.items():
        state = "error" if "error" in results[name] else "n/a" if "refused" in results[name] else ""
        states[cell.method, cell.bits, cell.merger] = state
    assert states["RTN", 3, "average"] == states["GPTQ", 3, "ties"] == "error"
    assert states["AWQ", 3, "average"] == "n/a"
    assert states["GPTQ", 3, "average"] == states["RTN", 4, "average"] == ""
    died = [r for n, r in results.items() if "ties" in n and "GPTQ / 3 bits" in n]
    assert died[0]["error"]["type"] == "WorkerDied"


def test_resume_computes_only_what_is_missing(finished, tmp_path):
    plan, first, _, work = finished
    before = (work / "calls.txt").read_text().splitlines()
    again, _ = run(plan, work, resume=True)
    after = (work / "calls.txt").read_text().splitlines()[len(before) :]
    failed = {name for name, result in first.items() if "error" in result}
    assert set(after) == failed and failed
    assert all(again[name] == first[name] for name in first if name not in failed)
    other, _ = run(plan, work, resume=True, decided_by={"code": "2"})
    assert set(other) == set(first)
    everything = (work / "calls.txt").read_text().splitlines()
    assert len(everything) == len(before) * 2 + len(after), "other code, so all over again"
    # Nothing is computed twice within one run either: a choice takes its candidate's figures.
    assert len(before) == len(set(before))


def test_tables_and_csv_say_all_of_it(finished):
    plan, results, _, _ = finished
    text = Tables(plan, results, "text4").markdown()
    assert "**text4, 4 bits: accuracy (%), average loss (nats)**" in text
    assert "| Simple averaging | 50.0 | 50.0 | 50.0 |  | 1.000 |" in text
    assert "| **w/ E-PMQ (α 1, by held-out rows)** | **51.0** |" in text
    assert "| RegMean++ (γ 0.5, by held-out rows) |" in text
    assert "RuntimeError (" in text and ". the disk is full" in text
    assert "n/a (" in text and ". no kernel for 3 bits" in text
    assert "WorkerDied (" in text
    assert "| w/ E-PMQ (α 10) | 60.0 | 60.0 | 60.0 | ↑ 10.0 | 1.000 |" in text
    assert "| E-PMQ | 256 | 51.0 | 3.0 | 1.50× |" in text
    assert "| w/ E-PMQ (α 1) | 51.0 | 51.0 | 51.0 | 51.0 | 51.0 | 51.0 |" in text  # 3 to 8 bits
    rows = list(csv.DictReader(io.StringIO(csv_of(plan, results))))
    assert {row["state"] for row in rows} == {"ok", "error", "n/a"}
    assert any(row["note"] == "the disk is full" for row in rows)
    figure = [
        r for r in rows if r["method"] == "E-PMQ" and r["alpha"] == "10.0" and r["bits"] == "4"
    ]
    assert {row["split"] for row in figure} == {"evaluation", "held_out"}
    assert {r["value"] for r in figure if r["metric"] == "accuracy"} == {"60.0", "10"}
    assert json.loads(json.dumps(results)) == results


def test_several_seeds_are_shown_with_their_spread(tmp_path):
    plan = planned(seeds=(0, 1), tables=("main",), mergers=("average",), methods=(), bits=(4,))
    results, _ = run(plan, tmp_path / "work")
    merges = [n for n, cell in plan.cells.items() if cell.kind == "merge"]
    assert len(merges) == 2
    results[merges[1]]["scores"]["evaluation"] = standin_cells.score(54)
    text = Tables(plan, results, "text4").markdown()
    assert "| Simple averaging | 52.0 ± 2.8 | 52.0 ± 2.8 | 52.0 ± 2.8 |" in text


def test_a_suite_that_cannot_be_built_fails_its_cells_alone(tmp_path):
    plan = planned(tables=("main",), mergers=("average",), methods=("RTN",), bits=(4,))
    runner = Runner(plan, tmp_path, workers=1, say=lambda line: None, function=fail_suite)
    results = runner.run()
    kinds = {plan.cells[name].kind: result["error"]["type"] for name, result in results.items()}
    assert kinds == {
        "suite": "ValueError", "base": "Skipped", "experts": "Skipped", "merge": "Skipped",
        "quantize": "Skipped",
    }  # fmt: skip


def fail_suite(cell, place, folder, key):
    assert cell.kind == "suite"
    raise ValueError("no such suite")
