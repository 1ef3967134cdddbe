"""The commands, on tiny models: what is written, what is said, and with which code they leave."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import EPMQError, EPMQNumericalError, __version__, cli
from epmq_gptq.commands import run_recipe
from epmq_gptq.host import loading

ROOT = Path(__file__).parents[2]
PARTS = dict(code="EPMQ-S01", subject="it", remedy="Do.")


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
                "math": {"file": "math.jsonl", "samples": 8, "seqlen": 16},
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
    files = "--json", tmp_path / "report.json", "--profile", tmp_path / "profile.json"
    result = fresh("quantize", path, "--out", out, *files)
    assert result.returncode == 0, result.stdout + result.stderr

    assert "rows        math: 8 of 12 (math.jsonl); code: 4 of 4 (code.txt)" in result.stdout
    assert "merge       average of 2 experts" in result.stdout
    assert "quantize    14/14 modules" in result.stdout
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "merge excess" in result.stdout
    assert "checkpoint  " in result.stdout and " in 9 files" in result.stdout
    assert all(line[0] in "rmlqsecop┏┃┡│├└" for line in result.stdout.splitlines())
    # How many depends on the machine.
    (line,) = result.stderr.splitlines()
    assert line.startswith("GPTQModel gave ") and line.endswith("; --verbose shows them.")

    # Nothing but what was asked for is left in the folder.
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"code.txt", "math.jsonl", "recipe.yaml", "report.json", "profile.json", "out"}

    profile = json.loads((tmp_path / "profile.json").read_text())
    assert set(profile) >= {"seconds", "phases", "peak_memory"} and profile["modules"] == 14
    assert "spent " in result.stdout and "peak memory" in result.stdout
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


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_merge_block_is_merge_and_quantize(recipe, tmp_path, models, method):
    base = {} if method == "average" else {"base": str(models[0])}
    experts = [each for name, path in models[1].items() for each in ("--expert", f"{name}={path}")]
    given = [each for key, path in base.items() for each in (f"--{key}", path)]
    result = run("merge", "--method", method, *experts, *given, "--out", tmp_path / "two")
    assert result.exit_code == 0, result.output
    merge = {"method": method, **base}
    for out, changes in {
        "one-4bit": {"merged": None, "merge": merge},
        "kept-4bit": {"merged": None, "merge": merge | {"keep": "kept"}},
        "two-4bit": {"merged": "two"},
    }.items():
        result = run("quantize", recipe(**changes), "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
    whole = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "kept" / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    expected = load_file(tmp_path / "two-4bit" / "model.safetensors")
    records = []
    for out in ("two-4bit", "one-4bit", "kept-4bit"):
        got = load_file(tmp_path / out / "model.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
        meta = json.loads((tmp_path / out / "quantize_config.json").read_text())["meta"]["epmq"]
        assert str(tmp_path.parent) not in json.dumps(meta)
        records.append((meta["merge"], meta["merged"]["sha256"], meta["experts"]))
    assert records[0] == records[1] == records[2]
    assert records[0][0]["method"] == method


def test_a_merge_takes_whole_models(recipe, tmp_path, models, no_model):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    experts = {"math": str(models[1]["math"]), "code": f"{models[0]}+lora"}
    path = recipe(merged=None, merge={"method": "average"}, experts=experts)
    result = run("quantize", path, "--out", tmp_path / "out")
    refused(result, "expert `code`: `merged+lora`", "no whole model", "merge_and_unload", "F34")


def test_a_kept_merge_stays_and_is_not_overwritten(recipe, tmp_path, monkeypatch):
    path = recipe(merged=None, merge={"method": "average", "keep": "kept"})

    def stop(*_):
        raise EPMQError("stop after the merge.", **PARTS)

    monkeypatch.setattr(loading, "load_merged", stop)
    assert run("quantize", path, "--out", tmp_path / "out").exit_code == 1
    assert (tmp_path / "kept" / "epmq_merge.json").is_file()
    again = run("quantize", path, "--out", tmp_path / "out")
    refused(again, "`merge.keep`: `kept` is there already", "`merged: kept`")
    inside = recipe(merged=None, merge={"method": "average", "keep": "out/kept"})
    refused(
        run("quantize", inside, "--out", tmp_path / "out"),
        "`merge.keep`",
        "`kept`, which is",
        "output",
    )


def test_a_temporary_merge_is_gone_after_a_failure(recipe, tmp_path, monkeypatch):
    def stop(merged, *_):
        assert merged.is_dir()
        raise EPMQError("stop after the merge.", **PARTS)

    monkeypatch.setattr(loading, "load_merged", stop)
    path = recipe(merged=None, merge={"method": "average"})
    assert run("quantize", path, "--out", tmp_path / "out").exit_code == 1
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded before the options were checked")

    monkeypatch.setattr(loading, "load_merged", load)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"quantise": {}}, ["`quantise` is not an option", "`quantize`"]),
        (
            {"quantize": {"group_sise": 64}},
            ["`group_sise` is not an option", "`group_size`"],
        ),
        ({"quantize": {"alpha": -1}}, ["`quantize`: `alpha` should be a number"]),
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
    refused(result, "`merged`: already quantized")


def test_places_that_no_machine_has_are_refused(recipe, tmp_path, monkeypatch, no_model):
    long = "x" * 300
    refused(run("quantize", recipe(), "--out", "~no-such-user/x"), "starts in a home folder")
    refused(run("quantize", recipe(), "--out", tmp_path / long), "`--out`", "F45")
    refused(run("quantize", "~no-such-user/m", "--out", "o"), "the merged model: `~no-such-user/m`")
    refused(run("quantize", "x" * 5000, "--out", "o"), "the merged model")
    refused(run("merge", "--method", "average", "--expert", "a=b", "--out", "~no-such-user/x"))
    refused(run("demo", "--quick", "--out", "~no-such-user/x"), "starts in a home folder")
    # A shell leaves the `~` of `--out=~/x` as it is.
    (tmp_path / "home" / "taken").mkdir(parents=True)
    (tmp_path / "home" / "taken" / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = run("quantize", recipe(), "--out=~/taken", "--json=~/r.json")
    refused(result, "`--out`: folder `taken` is not empty")
    assert json.loads((tmp_path / "home" / "r.json").read_text())["error"]["code"] == "EPMQ-F45"


def test_a_device_is_one_that_is_there(monkeypatch):
    assert loading.choose_device("cpu:0") == "cpu"  # where float32 is the default
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [loading.choose_device(each) for each in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for wrong in ("cuda:2", "cuda:x", "cuda1x", "gpu"):
        with pytest.raises(EPMQError, match="`--device` should be"):
            loading.choose_device(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(recipe, tmp_path, no_model):
    result = run("quantize", recipe(), "--out", tmp_path / "out", "--device", "cuda")
    refused(result, "`--device` is `cuda`, but torch sees no GPU")


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
    # The sampled rows of the preflight happen to hold it; what stops the run is the layer itself.
    warned, error = result.stderr.splitlines()
    assert warned.startswith("warning: ") and error.startswith("error: ")
    for line in (warned, error):
        assert "model.layers.0.mlp.down_proj" in line and "math" in line
        assert line.endswith("[EPMQ-F08]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (EPMQError("no.", **PARTS), 1, "error: no. Do. [EPMQ-S01]\n"),
        (EPMQNumericalError("no.", **PARTS), 3, "error: no. Do. [EPMQ-S01]\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; no checkpoint was written.\n"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd (run again with --verbose"),
    ],
)
def test_exit_codes(recipe, tmp_path, monkeypatch, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run_recipe, "run", fail)
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
    import epmq_gptq.evaluation.demo
    from epmq_gptq.evaluation.demo.domains import DOMAINS
    from epmq_gptq.evaluation.demo.table import DemoResult, Score

    seen = {}

    def run_demo(options, console, *, quiet):
        seen["options"] = options
        options.out.mkdir()
        console.print("the table")
        scores = {"merged": {name: Score(1.5, 0.25) for name in DOMAINS}}
        return DemoResult(scores, settings={"bits": options.bits, "group_size": 32})

    monkeypatch.setattr(epmq_gptq.evaluation.demo, "run_demo", run_demo)
    out = tmp_path / "demo"
    result = run("demo", "--quick", "--out", out, "--bits", 3, "--awq", "--method", "ties")
    assert result.exit_code == 0, result.output
    options = seen["options"]
    assert (options.out, options.bits, options.awq, options.quick) == (out, 3, True, True)
    assert options.merge_method == "ties"
    assert "the table" in result.stdout
    refused(run("demo", "--out", out, "--bits", 0), "`--bits`")
    quiet = run("demo", "--quiet", "--out", tmp_path / "quiet")
    assert "the table" not in quiet.stdout and "1.500 · 25.0" in quiet.stdout
    piped = run("demo", "--quiet", "--out", tmp_path / "piped", "--json", "-")
    assert json.loads(piped.stdout)["averages"] == {"merged": {"loss": 1.5, "accuracy": 0.25}}
    assert piped.stderr == ""


def test_help_and_version_are_quick_and_work_as_a_module():
    assert run("--version").stdout == f"epmq-gptq {__version__}\n"
    done = fresh("quantize", "--help", flags=["-X", "importtime"])
    assert done.returncode == 0
    assert "Keys of a recipe" in done.stdout
    assert "· samples: how many rows" in done.stdout
    assert not [
        line for line in done.stderr.splitlines() if line.endswith((" torch", " gptqmodel"))
    ]


# ---- quantize a merged model without a recipe --------------------------------------------------


def test_faults_have_their_code_and_leave_nothing(recipe, tmp_path, models, no_model):
    config = (models[0] / "config.json").read_text()
    weights = (models[0] / "model.safetensors").read_bytes()
    folders = {
        "pickled": {"config.json": config, "pytorch_model.bin": "x"},
        "quantized": {"config.json": config[:-2] + ', "quantization_config": {}}'},
        "broken": {"config.json": "{"},
    }
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        if name != "pickled":
            (tmp_path / name / "model.safetensors").write_bytes(weights)
    before = {entry.name for entry in tmp_path.iterdir()} | {"recipe.yaml", "report.json"}
    for changes, code, subject in [
        ({"merged": "pickled"}, "EPMQ-F14", "`merged`"),
        ({"merged": "quantized"}, "EPMQ-F07", "`merged`"),
        ({"merged": "broken"}, "EPMQ-F13", "`config.json`"),
        ({"merged": "nowhere/at/all"}, "EPMQ-F15", "`merged`"),
        ({"experts": {"math": "pickled", "code": "quantized"}}, "EPMQ-F14", "expert `math`"),
        ({"merged": None, "merge": {"method": "ties"}}, "EPMQ-O03", "`base`"),
    ]:
        path = recipe(**changes)
        report = tmp_path / "report.json"
        result = run("quantize", path, "--out", tmp_path / "a" / "b", "--json", report)
        refused(result, f"[{code}]\n")
        error = json.loads(report.read_text())["error"]
        assert (error["code"], error["subject"]) == (code, subject)
        assert f"error: {error['cause']} {error['remedy']} [{code}]\n" == result.stderr
        assert str(tmp_path) not in result.stderr
        assert {entry.name for entry in tmp_path.iterdir()} == before


def test_a_run_that_fails_late_leaves_no_folder(recipe, tmp_path, monkeypatch):
    def stop(*_):
        raise EPMQError("stop after the merge.", **PARTS)

    monkeypatch.setattr(loading, "load_merged", stop)
    path = recipe(merged=None, merge={"method": "average"})
    assert run("quantize", path, "--out", tmp_path / "new" / "deep" / "out").exit_code == 1
    assert not (tmp_path / "new").exists()


def test_a_full_disk_and_a_closed_folder_are_refused_at_once(
    recipe, tmp_path, models, monkeypatch, no_model
):
    from epmq_gptq.io import output

    free = []

    class Usage:
        def __init__(self, *_):
            self.free = free[-1]

    monkeypatch.setattr(output.shutil, "disk_usage", Usage)
    tensors = load_file(models[0] / "model.safetensors")
    entries = sum(t.numel() for t in tensors.values())
    packed = sum(t.numel() for n, t in tensors.items() if t.ndim == 2 and ".layers." in n) // 2
    checkpoint = packed + 2 * (entries - 2 * packed)
    merging = {"merged": None, "merge": {"method": "average"}}
    # The temporary folder, where finished layers wait, is on the same disk here.
    in_memory = {"quantize": {"bits": 4, "group_size": 32, "offload_to_disk": False}}
    for changes, needed in [
        ({}, checkpoint + packed),
        (in_memory, checkpoint),
        (merging, checkpoint + packed + 4 * entries),
    ]:
        free.append(needed - 1)
        path = recipe(**changes)
        refused(run("quantize", path, "--out", tmp_path / "out"), f"{needed:,}", "[EPMQ-F44]")
    monkeypatch.undo()

    def closed(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", closed)
    result = run("quantize", path, "--out", tmp_path / "out")
    refused(result, "`--out`", "Permission denied", "[EPMQ-F45]")


@pytest.fixture
def merge_folder(tmp_path, models):
    """A merged model with mergekit's file, beside rows; experts are named by their paths."""
    merged, experts = models
    folder = tmp_path / "merged"
    folder.mkdir()
    for file in merged.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sources = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(experts.values(), (0.5, 0.25), strict=True)
    ]
    configuration = {"merge_method": "linear", "models": sources, "dtype": "float32"}
    (folder / "mergekit_config.yml").write_text(yaml.safe_dump(configuration))
    for name in experts:
        lines = "".join(f"{i} {name} {i * i}\n" for i in range(8))
        (tmp_path / f"{name}.txt").write_text(lines)
    return folder


ROWS = [
    "--calibration",
    "expert0=math.txt",
    "--calibration",
    "expert1={file: code.txt, samples: 6}",
]


def test_a_merged_model_alone_is_enough(merge_folder, tmp_path):
    arguments = ["quantize", merge_folder, *ROWS, "--out", tmp_path / "out", "--seed", 5]
    arguments += ["--set", "group_size=32", "--set", "alpha=1e-1", "--batch-size", 4]
    result = run(*arguments, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert "merged      merged\n" in result.stdout
    assert "lineage     linear (says mergekit)\n" in result.stdout
    assert "expert      expert1: expert1, weight 0.25\n" in result.stdout
    recipe = json.loads((tmp_path / "r.json").read_text())["recipe"]
    assert recipe["quantize"] == {"group_size": 32, "alpha": 0.1}
    assert recipe["seed"] == 5
    meta = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]["epmq"]
    assert meta["alpha"] == 0.1
    assert meta["merge"] == {
        "tool": "mergekit",
        "method": "linear",
        "experts": {"expert0": "expert0", "expert1": "expert1"},
        "weights": {"expert0": 0.5, "expert1": 0.25},
        "dtype": "float32",
    }
    assert [each["rows"] for each in meta["experts"]] == [8, 6]
    assert str(tmp_path.parent) not in json.dumps(meta)


def test_what_a_recipe_knows_of_the_merge_is_recorded(recipe, tmp_path):
    lineage = {"tool": "FusionBench", "method": "ties", "trim": "whole model"}
    private = lineage | {"base": "/home/me/secret/base"}
    result = run("quantize", recipe(lineage=private), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    meta = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]["epmq"]
    assert meta["merge"] == lineage | {"base": "base"}
    refused(run("quantize", recipe(lineage=[1]), "--out", tmp_path / "no"), "`lineage`")


def test_missing_calibration_is_one_line_and_a_recipe_can_be_written(
    merge_folder, tmp_path, no_model
):
    result = run("quantize", merge_folder, "--out", tmp_path / "out", *ROWS[:2])
    refused(
        result,
        "calibration is missing for 1 of the 2 experts: `expert1`",
        "`--calibration expert1=FILE`",
        "[EPMQ-F21]",
    )
    file = tmp_path / "recipe.yaml"
    arguments = ["quantize", merge_folder, "--write-recipe", file, "--set", "bits=8", *ROWS[:2]]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "to be filled in: expert1" in result.stdout
    written = yaml.safe_load(file.read_text())
    assert written["merged"] == "merged"
    assert written["calibration"] == {"expert0": "math.txt"}
    assert written["quantize"] == {"bits": 8}
    assert written["lineage"]["weights"] == {"expert0": 0.5, "expert1": 0.25}
    refused(run(*arguments), "`recipe.yaml` exists", "--overwrite")
    assert run(*arguments, "--overwrite").exit_code == 0
    refused(run("quantize", file, "--out", tmp_path / "out"), "expert1")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_same_name_is_not_the_expert(merge_folder, tmp_path, models, no_model):
    """Our own record has the last part of a path, and many models are called `checkpoint-9`."""
    experts = []
    for name, path in models[1].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-9").symlink_to(path)
        shutil.copytree(path, tmp_path / name / "real" / "checkpoint-9")
        experts += ["--expert", f"{name}={tmp_path / name / 'real' / 'checkpoint-9'}"]
    result = run("merge", "--method", "average", *experts, "--out", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    shutil.copytree(models[1]["math"], tmp_path / "checkpoint-9")
    rows = ["--calibration", "math=math.txt", "--calibration", "code=code.txt"]
    arguments = ["quantize", "ours", *rows, "--out", tmp_path / "out"]
    refused(
        run(*arguments),
        "expert `code`: the folder `checkpoint-9` that was found holds other weights",
        "`--expert code=...`",
        "[EPMQ-F35]",
    )
    # With the right one the run goes on, up to the model.
    result = run(*arguments, "--expert", f"code={models[1]['code']}")
    assert "other weights" not in result.stderr


def test_options_go_with_what_they_are_for(recipe, merge_folder, tmp_path):
    for option, value in [
        ("--calibration", "math=a.txt"),
        ("--expert", "a=b"),
        ("--base", "b"),
        ("--dtype", "auto"),
        ("--seed", 0),
    ]:
        result = run("quantize", recipe(), "--out", tmp_path / "out", option, value)
        refused(result, f"`{option}` goes with a merged model", "[EPMQ-O03]")
    refused(run("quantize", recipe(), "--write-recipe", "r.yaml"), "`--write-recipe` goes with")
    refused(run("quantize", merge_folder, *ROWS), "`--out` is missing")
    refused(run("quantize", merge_folder, "--out", "o", "--set", "bits"), "`--set`", "name=value")
    refused(run("quantize", merge_folder, "--out", "o", "--set", "bits=["), "`--set bits`: line 1")
    result = run("quantize", merge_folder, "--write-recipe", tmp_path / "no" / "r.yaml")
    refused(result, "`--write-recipe`: `r.yaml` should be a file in a folder that exists")


def test_experts_of_another_machine_are_listed(merge_folder, tmp_path, models):
    configuration = {"merge_method": "linear", "models": ["/data/math", "/data/code", "/data/chat"]}
    (merge_folder / "mergekit_config.yml").write_text(yaml.safe_dump(configuration))
    given = ["--expert", f"math={models[1]['math']}", "--calibration", "math=math.txt"]
    result = run("quantize", merge_folder, "--out", tmp_path / "out", *given)
    refused(result, "`code` (`code`), `chat` (`chat`)", "`--expert code=...` `--expert chat=...`")
    assert "EPMQ-F35" in result.stderr and "/data" not in result.stderr


def on_a_terminal(*arguments, answers):
    """Run the command on a terminal of its own; each answer is typed when its word was asked."""
    import pty
    import select

    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-m", "epmq_gptq", *map(str, arguments)],
        stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    shown, answered = "", 0
    try:
        while select.select([leader], [], [], 60)[0]:
            try:
                shown += os.read(leader, 4096).decode()
            except OSError:  # the other end is closed
                break
            if answered < len(answers) and answers[answered][0] in shown:
                asked, typed = answers[answered]
                shown = shown.replace(asked, "(asked)", 1)
                # The question is there before its answer is read: Ctrl-C in between is forgotten,
                # as by any `input` of Python.
                time.sleep(0.5)
                os.write(leader, typed.encode())
                answered += 1
        return process.wait(60), shown
    finally:
        os.close(leader)
        process.kill()


def test_on_a_terminal_it_asks_for_the_rest(merge_folder, tmp_path, models):
    missing = "`expert1` (a file"
    code, shown = on_a_terminal(
        "quantize", merge_folder, "--out", models[1]["math"], "--overwrite", *ROWS[:2],
        answers=[(missing, "nowhere.txt\n"), (missing, "code.txt\n")],
    )  # fmt: skip
    # With all of it known, the run begins, and refuses to overwrite an expert.
    assert code == 2, shown
    assert "there is no file `nowhere.txt`" in shown
    assert "lies inside the folder of the expert `expert0`" in shown
    code, shown = on_a_terminal(
        "quantize", merge_folder, "--out", tmp_path / "out", answers=[("`expert0` (a file", "\x03")]
    )
    assert code == 130, shown
    assert "error: interrupted; no checkpoint was written." in shown


# ---- going on after a kill -----------------------------------------------------------------------


def test_a_run_that_can_go_on(recipe, tmp_path):
    unfinished = tmp_path / "unfinished"
    again = ["quantize", recipe(), "--resume", unfinished, "--json", tmp_path / "run.json"]
    result = run(*again, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert f"{unfinished} is no longer needed: the checkpoint stands." in result.stderr
    assert json.loads((tmp_path / "run.json").read_text())["report"]["attempts"] == 1
    assert list(unfinished.glob("attempt-*")) == []
    # From what is there: no layer is run again.
    result = run(*again, "--out", tmp_path / "other")
    assert json.loads((tmp_path / "run.json").read_text())["report"]["attempts"] == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    refused(
        run("quantize", recipe(quantize={"bits": 8, "group_size": 32}), *again[2:], "--out", "x"),
        "the checkpoint in `unfinished` is of another run: `bits` was 4, is 8.",
        "[EPMQ-F41]",
    )


def test_a_folder_to_go_on_from_is_looked_at_first(recipe, tmp_path, models):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    words = ["quantize", recipe(), "--out", tmp_path / "out", "--resume"]
    refused(run(*words, tmp_path / "thesis"), "`--resume` should be a new folder", "`chapter.tex`")
    refused(run(*words, models[0] / "x"), "`--resume` should lie outside of every input")
    refused(run(*words, tmp_path / "out" / "x"), "the folder of the output. Choose another folder.")


def test_a_disk_without_room_to_go_on_from(recipe, tmp_path, monkeypatch):
    def usage(folder):
        return shutil._ntuple_diskusage(10**9, 10**9, 100_000 if "small" in str(folder) else 10**9)

    (tmp_path / "small").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    words = ["quantize", recipe(), "--out", tmp_path / "out", "--resume", tmp_path / "small" / "x"]
    refused(run(*words), "`checkpoint` should be on a disk with", "bytes free, got 100,000")
