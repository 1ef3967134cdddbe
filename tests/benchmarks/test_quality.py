"""The cells themselves, on a stand-in suite: parity, saved checkpoints, the script as a whole."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import standin_suite
import torch
from quality import cells, plan
from safetensors.torch import load_file, save_file

from epmq_gptq.evaluation import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    (folder / "cache").mkdir()
    return cells.Place(
        work=folder / "work",
        cache=folder / "cache",
        batch_size=4,
        group_size=32,
        quick=True,
        device="cpu",
        suites_from="standin_suite",
    )


def cell(kind, **options):
    return plan.Cell(kind, "standin", 0, **options)


@pytest.fixture(scope="module")
def merged(place):
    result = cells.run_cell(cell("merge", merger="average", held_out=True), place, None, "avg")
    return result


def suite(place):
    return standin_suite.build_suite("standin", cache=place.cache)


def scores_of(module, place, split="evaluation"):
    found = suite(place).evaluate(module, split=split)
    return {task: score.loss for task, score in found.items()}


def test_a_merge_scores_as_its_average_in_memory(place, merged):
    experts = [load_file(p / "model.safetensors") for p in suite(place).experts.values()]
    state = {name: sum(e[name] for e in experts) / len(experts) for name in experts[0]}
    module = load_model(suite(place).base, device="cpu").module
    module.load_state_dict(state)
    for split in ("evaluation", "held_out"):
        for task, loss in scores_of(module, place, split).items():
            assert merged["scores"][split][task]["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_merge_that_was_saved_wrong_is_caught(place, monkeypatch):
    """The gate must see one tensor that is not what was merged."""
    honest = cells.merge

    def careless(*arguments, out, **options):
        honest(*arguments, out=out, **options)
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] *= -1
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(cells, "merge", careless)
    with pytest.raises(cells.ParityError, match="in memory"):
        cells.run_cell(cell("merge", merger="average"), place, None, "wrong")


def test_a_quantized_cell_scores_the_saved_checkpoint(place, merged, monkeypatch):
    """Evaluated is what was read from the folder, not the model that was quantized."""
    seen = []

    def load(path, **options):
        loaded = load_model(path, **options)
        seen.append((loaded.quantization, scores_of(loaded.module, place)))
        return loaded

    monkeypatch.setattr(cells, "load_model", load)
    wanted = cell("quantize", merger="average", method="E-PMQ", bits=3, alpha=0.1, samples=8)
    result = cells.run_cell(wanted, place, merged["merged"], "x")
    ((quantization, scores),) = seen
    assert quantization["bits"] == 3 and quantization["group_size"] == 32
    assert quantization["linears"] == 7
    losses = {task: s["loss"] for task, s in result["scores"]["evaluation"].items()}
    assert losses == scores
    assert losses != {t: s["loss"] for t, s in merged["scores"]["evaluation"].items()}
    assert result["seconds"] > 0
    assert not list(place.work.glob("quantized-*"))


def test_what_the_host_does_not_know_is_refused_with_its_reason(place, merged):
    wanted = cell("quantize", merger="average", method="GPTQ", bits=9, samples=8)
    with pytest.raises(cells.Refused, match="GPTQ with 9 bits.*GPTQModel refuses.*bits"):
        cells.run_cell(wanted, place, merged["merged"], "x")


def script():
    spec = importlib.util.spec_from_file_location("quality_script", ROOT / "benchmarks/quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_tables_and_refreshes_a_page(place, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- quality:standin -->\nold\n<!-- /quality:standin -->\nbelow\n")
    code = script().main(
        [
            "--suites-from", "standin_suite", "--suite", "standin", "--suite", "broken",
            "--tables", "main", "--mergers", "average", "--methods", "RTN", "--bits", "4",
            "--samples", "8", "--workers", "1", "--quick", "--device", "cpu",
            "--cache", str(place.cache), "--work", str(tmp_path / "work"),
            "--out", str(tmp_path / "out"), "--refresh", str(page),
        ]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 1 and "this suite cannot be built" in said
    text = page.read_text()
    assert text.startswith("above\n<!-- quality:standin -->\n**standin, 4 bits")
    assert text.endswith("<!-- /quality:standin -->\nbelow\n") and "old" not in text
    record = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert record["versions"]["gptqmodel"] and record["hardware"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(record)
    assert "--suite standin" in record["command"] and "--out" not in record["command"]
    markdown = (tmp_path / "out" / "quality.md").read_text()
    assert "## standin" in markdown and "w/ RTN" in markdown and "Tiny models" in markdown
    with open(tmp_path / "out" / "quality.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    rtn = [r for r in rows if r["suite"] == "standin" and r["method"] == "RTN"]
    assert {row["task"] for row in rtn} == {"first", "second"}
    base = load_model(suite(place).base, device="cpu").module
    expected = scores_of(base, place)["first"]
    (found,) = [
        r for r in rows if r["kind"] == "base" and r["suite"] == "standin"
        and (r["task"], r["metric"]) == ("first", "loss")
    ]  # fmt: skip
    assert float(found["value"]) == pytest.approx(expected, rel=1e-6)
    assert torch.get_num_threads() == 1
