"""What RegMean refuses, what it costs, and how it is run: from Python, a shell and a recipe."""

import json
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
import yaml
from merging_models import make_models, save_models
from regmean_models import distance, experts_of, merged, model_of, plan_of, stored
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from epmq_gptq import cli
from epmq_gptq.errors import EPMQError, EPMQInputError, EPMQNumericalError
from epmq_gptq.io.checkpoints import Checkpoint
from epmq_gptq.merging import merge, merge_methods, merge_state_dicts

METHODS = ("regmean", "regmean_plusplus")
ROWS = {"a": [list(range(4, 20))], "b": [list(range(9, 30))]}


@pytest.fixture
def llamas(tmp_path):
    return experts_of(model_of("llama"), tmp_path)


def _refused(code, match, method, base, experts, out, **options):
    with pytest.raises(EPMQError, match=match) as caught:
        merge(method, base=base, experts=experts, out=out, **options)
    assert caught.value.code == f"EPMQ-{code}"
    assert caught.value.subject and caught.value.remedy.endswith(".")
    assert not out.exists()
    return caught.value


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_needed(tmp_path, llamas, method):
    _refused("O03", f"`calibration` should be given: `{method}`", method, *llamas, tmp_path / "out")


@pytest.mark.parametrize("method", ["average", "wudi"])
def test_calibration_that_would_not_be_used(tmp_path, llamas, method):
    match = f"`calibration` should be left out: `{method}` looks at weights only"
    _refused("O03", match, method, *llamas, tmp_path / "out", calibration=ROWS)


@pytest.mark.parametrize(
    ("calibration", "code", "match"),
    [
        ({"a": ROWS["a"]}, "F21", "should name the same experts: .* without rows: b"),
        (ROWS | {"c": ROWS["a"]}, "F21", "should name the same experts: .* not an expert: c"),
        (ROWS | {"b": "data_free"}, "F22", "expert `b` is `data_free`"),
        (ROWS | {"b": []}, "F22", "expert `b`"),
        (plan_of("llama", ["a"]), "F21", r"exactly the experts \['a', 'b'\], got those of \['a'\]"),
        (plan_of("llama", ["a", "b", "c"]), "F21", r"got those of \['a', 'b', 'c'\]"),
        (plan_of("images", ["a", "b"]), "F32", "no row is an input of the layers of Llama"),
    ],
)
def test_rows_of_every_expert_and_of_no_other(tmp_path, llamas, calibration, code, match):
    options = {"calibration": calibration}
    _refused(code, match, "regmean", *llamas, tmp_path / "out", **options)


@pytest.mark.parametrize("value", [-0.1, 1.01, "0.9", True, float("nan")])
def test_gamma_has_a_range(tmp_path, llamas, value):
    parameters = {"reduce_non_diagonal_ratio": value}
    options = {"calibration": ROWS, "parameters": parameters}
    match = "`reduce_non_diagonal_ratio` should be a number from 0 "
    _refused("O01", match, "regmean", *llamas, tmp_path / "out", **options)


def test_models_that_are_no_known_network(tmp_path, llamas):
    base, experts = make_models(2)
    toys = save_models(tmp_path / "toys", base, experts)
    plan = plan_of("llama", ["a", "b"])
    match = "`architectures` of config.json names None; a merge with calibration runs"
    _refused("F38", match, "regmean", *toys, tmp_path / "out", calibration=plan)
    config = json.loads((llamas[0] / "config.json").read_text())
    for name in ("LlamaConfig", "NoSuchModel", "AutoModel", "utils"):
        (llamas[0] / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        match = f"`architectures` of config.json names '{name}'"
        _refused("F38", match, "regmean", *llamas, tmp_path / "out", calibration=plan)


def test_layers_that_are_stored_in_pieces(tmp_path):
    """transformers joins what Mixtral's checkpoints hold apart; our averages would miss it."""
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_local_experts=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**tiny.TOKENS, **shape, **heads))
    models = experts_of(model, tmp_path)
    match = "parameter `model.layers.0.mlp.* of MixtralForCausalLM has no tensor of its own"
    plan = plan_of("llama", ["a", "b"])
    _refused("F38", match, "regmean", *models, tmp_path / "out", calibration=plan)


def test_a_tower_that_some_rows_reach(tmp_path):
    models = experts_of(model_of("clip"), tmp_path)
    plan, images = plan_of("clip", ["a", "b"]), plan_of("images", ["a", "b"])
    plan.batches[-1] = images.batches[-1]
    match = "rows of `b` lack `input_ids`, which others have: `text_model.encoder.layers`"
    _refused("F22", match, "regmean", *models, tmp_path / "out", calibration=plan)


def test_state_dicts_do_not_suffice():
    base, experts = make_models(2)
    with pytest.raises(EPMQInputError, match="one that looks at weights only, got 'regmean'") as e:
        merge_state_dicts("regmean", base, experts)
    assert e.value.code == "EPMQ-O03"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tensor", "code"), [("layers.1.mlp.up_proj", "F08"), ("layers.1.input_layernorm", "F27")]
)
def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path, llamas, method, tensor, code):
    base, experts = llamas
    state = stored(experts["b"])
    state[f"model.{tensor}.weight"].flatten()[5] = float("nan")
    save_file(state, experts["b"] / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of("llama", ["a", "b"])
    error = _refused(code, "expert `b`", method, *llamas, tmp_path / "out", calibration=plan)
    assert isinstance(error, EPMQNumericalError) and error.expert == "b"


# ---- cost ----------------------------------------------------------------------------------------


def test_memory_does_not_know_how_many_experts_there_are(tmp_path, monkeypatch):
    """Of tensors that were read: one layer of one expert, what is outside of the layers, and one
    tensor of all experts. Counted in bytes that are alive at once, beside those."""
    model = tiny.llama(layers=3, hidden=16)
    base, experts = experts_of(model, tmp_path, count=5)
    real, alive, most = Checkpoint.read, {}, 0

    def read(self, name):
        nonlocal most
        tensor = real(self, name).clone()
        key = (self.what, name, object())
        alive[key] = (weakref.ref(tensor, lambda _: alive.pop(key, None)), tensor.nbytes)
        most = max(most, sum(size for _, size in alive.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    peaks = {}
    for method in METHODS:
        for count in (2, 5):
            some = dict(list(experts.items())[:count])
            alive.clear()
            most = 0
            plan = plan_of("llama", list(some), rows=2)
            merged(method, base, some, tmp_path / f"{method}{count}", plan)
            peaks[method, count] = most
        largest = max(tensor.nbytes for tensor in stored(base).values())
        assert peaks[method, 5] <= peaks[method, 2] + 3 * largest
        whole = sum(tensor.nbytes for tensor in stored(base).values())
        assert peaks[method, 5] < 2 * whole


def test_nothing_of_it_needs_the_host(tmp_path, llamas):
    base, experts = llamas
    given = json.dumps({name: str(path) for name, path in experts.items()})
    script = (
        "import sys\n"
        "from epmq_gptq.merging import merge\n"
        f"merge('regmean', base={str(base)!r}, experts={given}, out='out',"
        f" calibration={ROWS!r})\n"
        "assert 'gptqmodel' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "epmq_merge.json").is_file()


# ---- shell and recipe ----------------------------------------------------------------------------


def _run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def family(tmp_path):
    """Two fine-tunes that GPTQModel can quantize, and rows of text for each."""
    merge_of_them, paths = tiny.family(tmp_path, 2)
    experts = {"math": str(paths["expert0"]), "code": str(paths["expert1"])}
    sums = [json.dumps({"text": f"{i} + {i} = {2 * i}, so {2 * i} - {i}"}) for i in range(12)]
    (tmp_path / "math.jsonl").write_text("\n".join(sums))
    (tmp_path / "code.txt").write_text("\n\n".join(f"def f{i}(x): return x + {i}" for i in "abcd"))
    return str(merge_of_them), experts


def test_from_a_shell(tmp_path, family):
    base, experts = family
    named = [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    rows = (
        "--calibration",
        "math={file: math.jsonl, samples: 8}",
        "--calibration",
        "code=code.txt",
    )
    common = ("merge", "--method", "regmean_plusplus", *named, "--base", base)
    result = _run(*common, *rows, "--batch-size", 4, "--seed", 1, "--out", "one")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "one" / "epmq_merge.json").read_text())
    assert record["calibration"]["rows"] == {"math": 8, "code": 4}
    again = merge(
        "regmean_plusplus",
        base=base,
        experts=experts,
        out="two",
        calibration={
            "math": {"file": str(tmp_path / "math.jsonl"), "samples": 8},
            "code": tmp_path / "code.txt",
        },
        batch_size=4,
        seed=1,
    )
    assert again.record == record
    for name, tensor in stored(tmp_path / "one").items():
        assert torch.equal(stored(tmp_path / "two")[name], tensor), name
    for arguments, words in (
        (common, "`calibration` should be given"),
        ((*common, *rows[:2]), "code"),
        ((*common, *rows[:3], "code=data_free"), "data_free"),
        ((*common, *rows, "--batch-size", 0), "batch_size"),
        (("merge", "--method", "average", *named, *rows), "`calibration` should be left out"),
    ):
        result = _run(*arguments, "--out", "three")
        assert result.exit_code == 2 and words in result.output, result.output
        assert not (tmp_path / "three").exists()


def test_the_list_of_methods_says_what_needs_calibration():
    methods = merge_methods()
    assert [name for name, about in methods.items() if about["needs_calibration"]] == [*METHODS]
    assert not any(methods[name]["needs_base"] for name in METHODS)
    listed = _run("methods")
    assert listed.exit_code == 0 and listed.output.count("needs --calibration") == len(METHODS)
    for name in METHODS:
        gamma = methods[name]["parameters"]["reduce_non_diagonal_ratio"]
        assert name in listed.output and gamma["default"] == 0.95
        assert methods[name]["summary"].endswith(".")
        assert methods[name]["reference"].startswith("https://arxiv.org/abs/")


def test_from_a_recipe(tmp_path, family):
    """Merged and quantized with the same rows; the kept merge is the one from a shell."""
    base, experts = family
    recipe = {
        "merge": {"method": "regmean_plusplus", "base": base, "keep": "kept"},
        "experts": experts,
        "calibration": {"math": {"file": "math.jsonl", "samples": 8}, "code": "code.txt"},
        "quantize": {"bits": 4, "group_size": 32},
        "batch_size": 4,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = _run("quantize", "recipe.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "regmean_plusplus of 2 experts" in result.output
    meta = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]["epmq"]
    assert meta["merge"]["method"] == "regmean_plusplus"
    assert meta["merge"]["calibration"]["rows"] == {"math": 8, "code": 4}
    assert str(tmp_path) not in json.dumps(meta)
    merge(
        "regmean_plusplus",
        base=base,
        experts=experts,
        out="alone",
        calibration={
            "math": {"file": str(tmp_path / "math.jsonl"), "samples": 8},
            "code": tmp_path / "code.txt",
        },
        batch_size=4,
    )
    for name, tensor in stored(tmp_path / "alone").items():
        assert distance(stored(tmp_path / "kept")[name], tensor) < 1e-6, name

    recipe["calibration"]["code"] = "data_free"
    recipe["merge"]["keep"] = "kept too"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = _run("quantize", "recipe.yaml", "--out", "other")
    assert result.exit_code == 2 and "expert `code` is `data_free`" in result.output, result.output
    assert not (tmp_path / "kept too").exists() and not (tmp_path / "other").exists()
