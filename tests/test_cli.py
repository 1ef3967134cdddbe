"""The commands, on tiny models: what is written, what is said, and with which code they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import EPMQError, EPMQNumericalError, __version__, cli, pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, 2)
    return merged, {"math": experts["expert0"], "code": experts["expert1"]}


@pytest.fixture
def recipe(tmp_path, models):
    """Writes a recipe of two experts, with rows beside it, and returns its path."""
    sums = [json.dumps({"text": f"{i} + {i} = {2 * i}, so {2 * i} - {i}"}) for i in range(12)]
    (tmp_path / "math.jsonl").write_text("\n".join(sums))
    (tmp_path / "code.txt").write_text("\n\n".join(f"def f{i}(x): return x + {i}" for i in "abcd"))

    def write(**changes):
        merged, experts = models
        options = {
            "merged": str(merged),
            "experts": {name: str(path) for name, path in experts.items()},
            "calibration": {
                "math": {"file": "math.jsonl", "samples": 8, "max_tokens": 16},
                "code": "code.txt",
            },
            "quantize": {"bits": 4, "group_size": 32},
            "batch_size": 4,
        } | changes
        options = {key: value for key, value in options.items() if value is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        return str(tmp_path / "recipe.yaml")

    return write


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fresh(*arguments, **options):
    """The same in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(
        [sys.executable, *options.get("flags", []), "-m", "epmq_gptq", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def refused(result, *parts):
    """One line that starts with `error:` and holds every part; code 2."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


# ---- quantize ----------------------------------------------------------------------------------


def test_quantize_merges_quantizes_and_saves(recipe, tmp_path):
    out = tmp_path / "out"
    path = recipe(merged=None, merge={"method": "average"})
    # A process of its own: under pytest the host is quieter than it is for a user.
    result = fresh("quantize", path, "--out", out, "--json", tmp_path / "report.json")
    assert result.returncode == 0, result.stdout + result.stderr

    assert "rows        math: 8 of 12 (math.jsonl); code: 4 of 4 (code.txt)" in result.stdout
    assert "merge       average of 2 experts" in result.stdout
    assert "quantize    14/14 modules" in result.stdout
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "merge excess" in result.stdout
    assert "checkpoint  " in result.stdout and " in 7 files" in result.stdout
    assert all(line[0] in "rmlqsec┏┃┡│├└" for line in result.stdout.splitlines())
    assert result.stderr == "GPTQModel gave 2 warnings on the way; --verbose shows them.\n"

    # Nothing but what was asked for is left in the folder.
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"code.txt", "math.jsonl", "recipe.yaml", "report.json", "out"}

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cut_rows"] == {"math": 8, "code": 0}
    assert report["report"]["rows"] == {"math": 8, "code": 4}
    assert report["report"]["tokens"]["math"] == 8 * 16
    assert len(report["report"]["modules"]) == 14
    meta = json.loads((out / "quantize_config.json").read_text())["meta"]["epmq"]
    assert meta["merge"]["method"] == "average"
    assert meta["merged"]["source"] == "merged"

    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(
        str(out), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    ).model
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "TorchLinear"


def test_a_kept_merge_stays_and_is_not_overwritten(recipe, tmp_path, monkeypatch):
    path = recipe(merged=None, merge={"method": "average", "keep": "kept"})

    def stop(*_):
        raise EPMQError("stop after the merge")

    monkeypatch.setattr(pipeline, "_load", stop)
    assert run("quantize", path, "--out", tmp_path / "out").exit_code == 1
    assert (tmp_path / "kept" / "epmq_merge.json").is_file()
    again = run("quantize", path, "--out", tmp_path / "out")
    refused(again, "`merge.keep`: `kept` is there already", "`merged: kept`")
    inside = recipe(merged=None, merge={"method": "average", "keep": "out/kept"})
    refused(run("quantize", inside, "--out", tmp_path / "out"), "`merge.keep`: `kept` is, holds")


def test_a_temporary_merge_is_gone_after_a_failure(recipe, tmp_path, monkeypatch):
    def stop(merged, *_):
        assert merged.is_dir()
        raise EPMQError("stop after the merge")

    monkeypatch.setattr(pipeline, "_load", stop)
    path = recipe(merged=None, merge={"method": "average"})
    assert run("quantize", path, "--out", tmp_path / "out").exit_code == 1
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded before the options were checked")

    monkeypatch.setattr(pipeline, "_load", load)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"quantise": {}}, ["`quantise` is not an option", "`quantize`"]),
        ({"quantize": {"group_sise": 64}}, ["`quantize`: `group_sise`", "`group_size`"]),
        ({"quantize": {"alpha": -1}}, ["`quantize`: `alpha` should be finite"]),
        ({"quantize": {"damp_percent": 0.1}}, ["`damp_percent` is not an option", "`alpha`"]),
        ({"calibration": {"math": "math.jsonl"}}, ["without rows: code"]),
        (
            {"calibration": {"math": {"file": "math.jsonl", "samples": 40}, "code": "code.txt"}},
            ["`samples` asks for 40 rows, there are 12"],
        ),
        ({"merged": "nowhere"}, ["`merged`: ", "nowhere` is neither an existing folder nor"]),
        ({"merged": None, "merge": {"method": "averge"}}, ["`merge`: `method`", "average"]),
        ({"merged": None, "merge": {"method": "ties"}}, ["`merge`: `base`"]),
        (
            {"merged": None, "merge": {"method": "average", "parameters": {"lam": 1}}},
            ["`merge`: `lam` is not an option of `average`"],
        ),
    ],
)
def test_a_bad_recipe_is_refused_before_the_model_is_loaded(
    recipe, tmp_path, no_model, changes, parts
):
    refused(run("quantize", recipe(**changes), "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_a_bad_place_is_refused_before_the_model_is_loaded(recipe, tmp_path, models, no_model):
    path = recipe()
    merged, experts = models
    refused(run("quantize", path, "--out", tmp_path), "`--out`", "not empty", "--overwrite")
    refused(
        run("quantize", path, "--out", experts["math"], "--overwrite"),
        "lies inside the folder of the expert `math`",
    )
    refused(
        run("quantize", path, "--out", tmp_path / "out", "--json", tmp_path / "no" / "r.json"),
        "`--json`",
    )
    refused(run("quantize", path, "--out", tmp_path / "o", "--device", "tpu"), "`--device`", "tpu")
    refused(run("quantize", path, "--out", tmp_path / "o", "--batch-size", 0), "`--batch-size`")
    refused(run("quantize", tmp_path / "no.yaml", "--out", tmp_path / "o"), "no.yaml")


def test_a_quantized_model_is_refused(recipe, tmp_path, models, no_model):
    config = json.loads((models[0] / "config.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    (again / "model.safetensors").symlink_to("m.safetensors")
    (again / "m.safetensors").write_bytes((models[0] / "model.safetensors").read_bytes())
    result = run("quantize", recipe(merged="again"), "--out", tmp_path / "out")
    refused(result, "`merged`: `again` is already quantized")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(recipe, tmp_path, no_model):
    result = run("quantize", recipe(), "--out", tmp_path / "out", "--device", "cuda")
    refused(result, "`--device cuda`: torch sees no GPU")


def test_numbers_that_cannot_be_trusted_leave_with_3(recipe, tmp_path, models):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in models[1]["math"].iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    state = load_file(bad / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(state, bad / "model.safetensors", metadata={"format": "pt"})
    experts = {"math": "bad", "code": str(models[1]["code"])}
    result = run("quantize", recipe(experts=experts), "--out", tmp_path / "out")
    assert result.exit_code == 3, result.output
    assert result.stderr.count("\n") == 1
    assert "model.layers.0.mlp.down_proj" in result.stderr and "math" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (EPMQError("no"), 1, "error: no\n"),
        (EPMQNumericalError("no"), 3, "error: no\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; no checkpoint was written.\n"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd (run again with --verbose"),
    ],
)
def test_exit_codes(recipe, tmp_path, monkeypatch, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "quantize_recipe", fail)
    result = run("quantize", recipe(), "--out", tmp_path / "out")
    assert result.exit_code == code
    assert result.stderr.startswith(text)
    assert "Traceback" not in result.stderr


# ---- the other commands ------------------------------------------------------------------------


def test_merge_writes_a_model(tmp_path, models):
    merged, experts = models
    named = [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    out = tmp_path / "new"
    chosen = ["--method", "task_arithmetic", "--base", merged, "--param", "lam=5e-1"]
    result = run("merge", *chosen, *named, "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "epmq_merge.json").read_text())
    assert record["parameters"] == {"lam": 0.5}
    assert list(record["experts"]) == ["math", "code"]
    assert "merge       task_arithmetic of 2 experts" in result.stdout
    refused(run("merge", *chosen, *named, "--out", out), "`--out`", "--overwrite")
    assert run("merge", *chosen, *named, "--out", out, "--overwrite").exit_code == 0


def test_options_of_merge_are_checked(tmp_path, models):
    merged, experts = models
    first = ["--expert", f"a={experts['math']}", "--out", tmp_path / "new"]
    refused(
        run("merge", "--method", "average", "--expert", "x", *first), "`--expert`", "name=value"
    )
    refused(run("merge", "--method", "average", *first[:2], *first), "`a` is given twice")
    refused(run("merge", "--method", "average", *first, "--param", "lam=1"), "`lam`", "`average`")
    refused(run("merge", "--method", "averge", *first), "`method`", "averge")


def test_methods_lists_papers_and_parameters():
    from epmq_gptq.merging import merge_methods

    result = run("methods")
    assert result.exit_code == 0
    for name, about in merge_methods().items():
        assert name in result.stdout and about["reference"] in result.stdout
        assert all(parameter in result.stdout for parameter in about["parameters"])


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    import epmq_gptq.demo

    seen = {}

    def run_demo(options, console, *, quiet):
        seen["options"] = options
        options.out.mkdir()
        console.print("the table")

    monkeypatch.setattr(epmq_gptq.demo, "run_demo", run_demo)
    out = tmp_path / "demo"
    result = run("demo", "--quick", "--out", out, "--bits", 3, "--awq", "--method", "ties")
    assert result.exit_code == 0, result.output
    options = seen["options"]
    assert (options.out, options.bits, options.awq, options.quick) == (out, 3, True, True)
    assert options.merge_method == "ties"
    assert "the table" in result.stdout
    refused(run("demo", "--out", out, "--bits", 0), "`--bits`")


def test_help_and_version_are_quick_and_work_as_a_module():
    assert run("--version").stdout == f"epmq-gptq {__version__}\n"
    done = fresh("quantize", "--help", flags=["-X", "importtime"])
    assert done.returncode == 0
    assert "Keys of a recipe" in done.stdout
    assert "· samples: how many rows" in done.stdout
    assert not [
        line for line in done.stderr.splitlines() if line.endswith((" torch", " gptqmodel"))
    ]
