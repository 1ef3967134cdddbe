"""``epmq-gptq inspect``: all errors at once, exit codes, JSON; and what a run is told."""

import json
import shutil
import warnings

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import EPMQConfig, cli
from epmq_gptq.checks.check import run_preflight
from epmq_gptq.commands.inspection import Subject, inspect
from epmq_gptq.errors import EPMQInputError, EPMQWarning
from epmq_gptq.experts.experts import Experts
from epmq_gptq.host.model_linears import quantizable_linears
from epmq_gptq.io.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, 2)
    return folder, merged, {"math": experts["expert0"], "code": experts["expert1"]}


@pytest.fixture
def recipe(tmp_path, models):
    """Writes a recipe, and changes copies of the experts where it is told to."""
    _, merged, experts = models
    for name, seed in (("math", 1), ("code", 2)):
        rows = "\n".join(json.dumps(row) for row in tiny.rows(8, 64, seed))
        (tmp_path / f"{name}.jsonl").write_text(rows)

    def write(**changes):
        options = {
            "merged": str(merged),
            "experts": {name: str(path) for name, path in experts.items()},
            "calibration": {name: f"{name}.jsonl" for name in experts},
            "quantize": {"bits": 4, "group_size": 32},
        } | changes
        options = {key: value for key, value in options.items() if value is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        return str(tmp_path / "recipe.yaml")

    return write


def run(*arguments):
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])


def changed(source, folder, change):
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_good_recipe_exits_with_0_and_writes_only_the_json(recipe, tmp_path):
    path = recipe()
    before = set(tmp_path.rglob("*"))
    result = run(path, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    for text in ("ready to run", "math", "vLLM", "estimated", "cosine", "per d_in 64"):
        assert text in result.output
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "found.json"}
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["coverage"]["tokens"] == {"math": 512, "code": 512}
    assert found["similarity"]["share"] == 1 and not found["findings"]
    assert found["models"]["math"]["linears"] == 14
    assert set(found["estimates"]) == {"disk", "memory", "time"}


def test_all_errors_are_shown_not_only_the_first(recipe, models, tmp_path):
    _, _, experts = models
    down = "model.layers.1.mlp.down_proj.weight"

    def lose(state):
        for name in [name for name in state if "layers.1.self_attn" in name]:
            del state[name]
        state[down] = state[down][:, :-2].clone()

    broken = changed(experts["math"], tmp_path / "broken", lose)
    (tmp_path / "math.jsonl").write_text("{")
    path = recipe(
        experts={"math": broken, "code": str(tmp_path / "nowhere"), "old": str(experts["code"])},
        calibration={"math": "math.jsonl", "code": "code.jsonl", "old": "code.jsonl"},
        quantize={"bits": 9},
    )
    result = run(path)
    assert result.exit_code == 2
    # Of the options, an expert that is not there, rows, and every tensor of the other.
    codes = [line.split()[1] for line in result.output.splitlines() if line.startswith("error")]
    assert sorted(codes) == ["EPMQ-F01"] * 4 + ["EPMQ-F03", "EPMQ-F15", "EPMQ-F32", "EPMQ-F33"]
    assert "`bits`" in result.output and "cannot run: 8 errors" in result.output
    assert str(tmp_path) not in result.output


def test_json_to_stdout_is_json_alone(recipe, models):
    result = run(recipe(), "--json", "-", "--verify", "headers", "--set", "bits=3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verify"] == "headers" and found["bytes_read"] == 0
    assert found["serving"]["vLLM"]["verdict"] == "no"
    assert [finding["code"] for finding in found["findings"]] == ["EPMQ-F33"]


def test_full_finds_a_nan_in_an_expert(recipe, models, tmp_path):
    def spoil(state):
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")

    spoilt = changed(models[2]["math"], tmp_path / "spoilt", spoil)
    path = recipe(experts={"math": spoilt, "code": str(models[2]["code"])})
    assert run(path).exit_code == 0
    result = run(path, "--verify", "full")
    assert result.exit_code == 2 and "EPMQ-F08" in result.output and "(3, 5)" in result.output


def test_mistakes_on_the_command_line_are_one_line(recipe, tmp_path):
    for arguments, text in (
        ((recipe(), "--verify", "deep"), "invalid value for '--verify'"),
        ((tmp_path / "none.yaml",), "none.yaml"),
        ((recipe(), "--json", tmp_path / "no" / "x.json"), "`--json`"),
        ((recipe(), "--base", "org/x"), "`--base` goes with a merged model"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and text in result.stderr, result.output
        assert result.stderr.count("\n") == 1


def test_a_merged_model_without_calibration_is_inspected(models):
    _, merged, experts = models
    named = [f"{name}={path}" for name, path in experts.items()]
    result = run(merged, "--expert", named[0], "--expert", named[1], "--set", "group_size=32")
    assert result.exit_code == 0, result.output
    assert "EPMQ-F21" in result.output and "ready to run: 1 warning" in result.output


def test_experts_of_a_lineage_that_are_not_here_are_errors(models, tmp_path):
    _, merged, experts = models
    copy = tmp_path / "merged"
    shutil.copytree(merged, copy)
    sources = [{"model": "/nowhere/gone"}, {"model": str(experts["math"])}]
    lineage = {"merge_method": "linear", "models": sources, "dtype": "float32"}
    (copy / "mergekit_config.yml").write_text(yaml.safe_dump(lineage))
    result = run(copy, "--set", "group_size=32")
    assert result.exit_code == 2, result.output
    assert "EPMQ-F35" in result.output and "--expert gone=" in result.output
    assert "cannot run: 1 error" in result.output


def test_a_recipe_that_merges_is_inspected_before_there_is_a_merge(recipe):
    result = run(recipe(merged=None, merge={"method": "average"}))
    assert result.exit_code == 0, result.output
    assert "first expert stands in" in result.output


def test_a_merge_that_a_run_would_refuse_is_an_error(recipe):
    for merge, code in (({"method": "bogus"}, "EPMQ-O01"), ({"method": "ties"}, "EPMQ-O03")):
        result = run(recipe(merged=None, merge=merge))
        assert result.exit_code == 2 and code in result.output, result.output


def test_a_quantized_or_broken_merge_is_a_finding(models, tmp_path):
    _, merged, experts = models
    bad = tmp_path / "merged"
    shutil.copytree(merged, bad)
    (bad / "model.safetensors").write_bytes(b"")
    found = inspect(Subject(str(bad), {name: str(path) for name, path in experts.items()}))
    assert [finding.code for finding in found.errors] == ["EPMQ-F12"] and not found.models


# ---- a run ---------------------------------------------------------------------------------------


def prepared(models, **options):
    _, merged, experts = models
    config = EPMQConfig(
        bits=4, group_size=32, experts={n: str(p) for n, p in experts.items()}, **options
    )
    linears = list(quantizable_linears(tiny.load(merged, config)))
    return config, Checkpoint(merged, what="the merged model"), Experts(config.experts), linears


def test_a_run_is_told_by_warnings_and_errors(models):
    parts = prepared(models)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EPMQWarning)
        result = run_preflight(*parts, {"math": 500, "code": 500})
    assert not result.findings
    assert parts[2].rows("math", parts[3][0].name, 0, 2).shape == (2, 64)
    parts = prepared(models)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_preflight(*parts, {"math": 5, "code": 500})
    ours = [each.message for each in caught if isinstance(each.message, EPMQWarning)]
    assert "has 5 calibration tokens" in str(ours[0])
    assert [warning.code for warning in ours] == ["EPMQ-F23", "EPMQ-F26"]
    with pytest.raises(EPMQInputError, match="has no tokens") as refused:
        run_preflight(*prepared(models), {"math": 0, "code": 500})
    assert refused.value.code == "EPMQ-F22"


def test_an_adapter_is_compared_with_its_factors(models, tmp_path):
    _, merged, experts = models
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    generator = torch.Generator().manual_seed(0)
    factors = {
        name.format("A"): torch.randn(2, 64, generator=generator),
        name.format("B"): torch.randn(64, 2, generator=generator),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(options))
    # The same update, twice, and once with no update at all.
    specs = {"whole": str(experts["math"]), "low": f"{experts['math']}+{adapter}"}
    found = inspect(Subject(str(merged), specs, {"group_size": 32}))
    assert not found.errors
    weights = load_file(experts["math"] / "model.safetensors")
    merge = load_file(merged / "model.safetensors")
    linears = [name for name in merge if ".layers." in name and merge[name].ndim == 2]
    far = {"whole": 0.0, "low": 0.0}
    for linear in linears:
        far["whole"] += float((weights[linear] - merge[linear]).double().square().sum())
        if linear == "model.layers.0.self_attn.q_proj.weight":
            weights[linear] += factors[name.format("B")] @ factors[name.format("A")]
        far["low"] += float((weights[linear] - merge[linear]).double().square().sum())
    size = sum(float(merge[linear].double().square().sum()) for linear in linears)
    for which, square in far.items():
        expected = (square / size) ** 0.5
        assert found.similarity["to_merged"][which] == pytest.approx(expected, rel=1e-5)
    factors[name.format("B")].zero_()
    save_file(factors, adapter / "adapter_model.safetensors")
    found = inspect(Subject(str(merged), specs, {"group_size": 32}))
    assert [finding.code for finding in found.errors] == ["EPMQ-F17"]


def test_the_estimated_size_is_that_of_a_real_checkpoint(models, tmp_path):
    config, merged, experts, linears = prepared(models)
    rows = {name: tiny.rows(8, 64, seed) for seed, name in enumerate(experts.names)}
    tokens = {name: 8 * 64 for name in rows}
    estimates = run_preflight(config, merged, experts, linears, tokens).estimates
    again = EPMQConfig.from_options(config.to_options())
    model = tiny.load(merged.path, again)
    seconds = model.quantize(rows, batch_size=4)["epmq"].seconds
    model.save(str(tmp_path / "out"))
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # Headers are not counted.
    assert 0.9 < estimates["disk"]["checkpoint"] / size <= 1
    low, high = estimates["time"]["seconds"]
    # Only that it is no other order of magnitude: this machine may be busy.
    assert low / 30 < seconds < 30 * high
