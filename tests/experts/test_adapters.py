"""A LoRA expert is the same expert merged into full weights, without being built."""

import json
import math

import pytest
import tiny
import torch
from judge import codes
from lora import peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.experts.adapters import Adapter, is_adapter
from epmq_gptq.experts.experts import Experts, split_adapter
from epmq_gptq.experts.linears import Linear, StoredWeight, piece, resolve
from epmq_gptq.method.target import expert_target

LLAMA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 6},
        "alpha_pattern": {"k_proj": 1, "mlp.down_proj": 20},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "up_proj"]},
}


def linears(model) -> list[Linear]:
    return [
        Linear(
            name,
            tuple(module.weight.shape),
            (f"{name}.weight",),
            transposed=type(module).__name__ == "Conv1D",
        )
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    ]


def split_linears(model) -> list[Linear]:
    """As the host has them: gate and up of Phi-3 are two layers."""
    found = []
    for linear in linears(model):
        parent, _, leaf = linear.name.rpartition(".")
        if leaf != "gate_up_proj":
            found.append(linear)
            continue
        shape = (linear.shape[0] // 2, linear.shape[1])
        for part, half in enumerate((f"{parent}.gate_proj", f"{parent}.up_proj")):
            joined = (StoredWeight(linear.tensors[0], part=part),)
            found.append(Linear(half, shape, (f"{half}.weight",), joined))
    return found


def phi3():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return Phi3ForCausalLM(Phi3Config(**tiny.TOKENS, **shape))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(**tiny.TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=64, n_inner=64)
    )


CASES = {name: (tiny.llama, options) for name, options in LLAMA.items()} | {
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "joined": (phi3, {"target_modules": ["gate_up_proj", "qkv_proj"]}),
    "joined dora": (phi3, {"target_modules": ["gate_up_proj"], "use_dora": True}),
    "joined modules_to_save": (
        phi3,
        {"target_modules": ["qkv_proj"], "modules_to_save": ["gate_up_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_has_the_same_target_as_the_expert_it_makes(case, tmp_path):
    build, options = CASES[case]
    build().save_pretrained(tmp_path / "base")
    model = peft_model(build(), **options)
    model.save_pretrained(tmp_path / "adapter")
    layers = split_linears(build())
    model.merge_and_unload().save_pretrained(tmp_path / "full")

    experts = Experts(
        {"lora": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "full": str(tmp_path / "full")}
    )
    experts.bind(layers)
    differs = 0
    generator = torch.Generator().manual_seed(1)
    for linear in layers:
        W_m = 0.1 * torch.randn(linear.outputs, linear.inputs, generator=generator)
        X = torch.randn(300, linear.inputs, generator=generator)
        H = X.T @ X
        L = torch.linalg.cholesky(H + 0.1 * H.diagonal().mean() * torch.eye(linear.inputs))
        targets = []
        for name in ("lora", "full"):
            D = torch.zeros_like(W_m)
            experts.delta(name, linear.name, W_m).add_product_(D, H)
            targets.append(expert_target(W_m, D, L).W)
        torch.testing.assert_close(*targets, rtol=2e-5, atol=2e-6)
        W = experts.delta("full", linear.name, torch.zeros_like(W_m)).dense
        rows = experts.rows("lora", linear.name, 3, 9)
        torch.testing.assert_close(rows, W[3:9], rtol=1e-5, atol=1e-6)
        store = experts.store("lora")
        place = resolve(linear, store)
        base = piece(store.read(place.tensor), place).float()
        differs += not torch.equal(W, base.t() if linear.transposed else base)
    changed = {*experts.adapter("lora").modules, *experts.adapter("lora").replaced}
    changed = {name.removesuffix(".weight") for name in changed} - {"lm_head"}
    assert differs == len(changed) + sum("gate_up_proj" in name for name in changed)


def test_no_product_of_the_factors_is_ever_built(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    peft_model(tiny.llama()).save_pretrained(tmp_path / "adapter")
    experts = Experts({"x": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"})
    layers = linears(tiny.llama())
    experts.bind(layers)
    adapted = layers[0]
    W_m = experts.store("x").read(adapted.tensors[0])
    delta = experts.delta("x", adapted.name, W_m)
    B, A = delta.low_rank
    assert not delta.dense.any() and (B.shape, A.shape) == ((64, 4), (4, 64))


def test_quantizing_with_an_adapter_is_quantizing_with_the_expert_it_makes(tmp_path):
    merged, paths = tiny.family(tmp_path, experts=1)
    tiny.save(tiny.llama(), tmp_path / "base")
    model = peft_model(tiny.llama())
    model.save_pretrained(tmp_path / "adapter")
    tiny.save(model.merge_and_unload(), tmp_path / "full")
    # The adapter names its base itself, as one that was trained here does.
    file = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(options))

    rows = {"a": tiny.rows(6, 60, seed=0), "b": tiny.rows(6, 60, seed=1)}
    outcomes = {}
    for form in ("adapter", "full"):
        experts = {"a": paths["expert0"], "b": tmp_path / form}
        loaded = tiny.load(
            merged, EPMQConfig(profile="paper", group_size=32, experts=experts, alpha=0.1)
        )
        outcomes[form] = loaded.quantize(rows, batch_size=3)["epmq"]
        loaded.save(str(tmp_path / f"out-{form}"))
    for one, other in zip(outcomes["adapter"].modules, outcomes["full"].modules, strict=True):
        if ".0." in one.module:
            # What comes after a rounding sees codes that may have tipped.
            close = 1e-4 if one.module.endswith(("q_proj", "k_proj", "v_proj")) else 1e-2
            assert one.merge_excess == pytest.approx(other.merge_excess, rel=close)
    one, other = codes(tmp_path / "out-adapter"), codes(tmp_path / "out-full")
    first = "model.layers.0.self_attn.q_proj"
    assert (one[first] != other[first]).float().mean() < 1e-3
    record = json.loads((tmp_path / "out-adapter" / "quantize_config.json").read_text())
    described = record["meta"]["epmq"]["experts"][1]
    assert described["source"] == "adapter" and described["adapter_of"]["source"] == "base"
    assert str(tmp_path) not in json.dumps(record)


# ---- what cannot be exact is refused by name -----------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    peft_model(tiny.llama(layers=1), lora_bias=False).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def opened(folder, code="EPMQ-F34"):
    with pytest.raises(EPMQInputError) as caught:
        experts = Experts({"math": f"{folder.parent / 'base'}+{folder}"})
        experts.bind(linears(tiny.llama(layers=1)))
    assert caught.value.code == code and "math" in str(caught.value)
    assert caught.value.remedy and caught.value.subject
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "`peft_type` is LOHA"),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets `target_parameters`"),
        ({"alora_invocation_tokens": [1, 2]}, "sets `alora_invocation_tokens`"),
        ({"layer_replication": [[0, 1]]}, "sets `layer_replication`"),
        ({"use_qalora": True}, "sets `use_qalora`"),
        ({"an_option_of_tomorrow": 3}, "sets `an_option_of_tomorrow`"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "it changed the base's own weights"),
        ({"r": 8}, "has factors of rank 4 and 4, `adapter_config.json` says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj` has factors of rank 4"),
        ({"r": "four"}, "`r` should be a positive integer, got 'four'"),
        ({"lora_alpha": None, "alpha_pattern": {"q_proj": "x"}}, "should be a number, got 'x'"),
        ({"use_dora": True}, "has no `lora_magnitude_vector`"),
        ({"rank_pattern": [1]}, "`adapter_config.json`"),
    ],
)
def test_an_option_that_changes_the_weight_is_refused(folder, options, message):
    change(folder, **options)
    assert message in opened(folder)


def test_tensors_that_cannot_be_accounted_for_are_refused(folder):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

    def rename(old, new):
        return lambda tensors: tensors.__setitem__(new, tensors.pop(old))

    change_tensors(folder, rename(name.format("B"), name.format("E")))
    assert "lora_E.weight` is not one of" in opened(folder)
    change_tensors(folder, rename(name.format("E"), "elsewhere.lora_B.weight"))
    assert "q_proj` has no `lora_B`" in opened(folder)
    change_tensors(folder, rename("elsewhere.lora_B.weight", name.format("B")))

    change_tensors(folder, lambda t: t.update({name.format("A"): torch.ones(4, 32)}))
    message = opened(folder)
    assert "B A has shape (64, 32)" in message and "has (64, 64)" in message
    change_tensors(folder, lambda t: t.update({name.format("A"): torch.ones(4, 64)}))

    other = name.replace("q_proj", "other_proj")
    more = {other.format("A"): torch.ones(4, 64), other.format("B"): torch.ones(64, 4)}
    change_tensors(folder, lambda t: t.update(more))
    assert "changes `model.layers.0.self_attn.other_proj`, which neither" in opened(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # As a model of another class would have named it: nothing here would ever read it.
        ("model.language_model.layers.0.mlp.up_proj.weight", "changes `model.language_model.la"),
        ("model.layers.0.mlp.up_proj.modules_to_save.weight", "is not one of a LoRA or DoRA"),
        ("model.layers.0.mlp.up_proj.modules_to_save.default.weight", "is not one of a LoRA"),
        ("model.layers.0.mlp.up_proj.original_module.weight", "is not one of a LoRA or DoRA"),
    ],
)
def test_a_weight_saved_whole_is_used_or_refused(folder, name, message):
    change_tensors(folder, lambda t: t.update({f"base_model.model.{name}": torch.ones(128, 64)}))
    assert message in opened(folder)


@pytest.mark.parametrize("form", ["adapted", "saved whole"])
def test_a_head_that_the_base_ties_to_its_embedding_may_be_changed(form, tmp_path):
    base = tiny.llama(layers=1, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    head = {"lm_head.weight": torch.ones(260, 64)}
    if form == "adapted":
        head = {
            "lm_head.lora_A.weight": torch.ones(4, 64),
            "lm_head.lora_B.weight": torch.ones(260, 4),
        }
    peft_model(base).save_pretrained(tmp_path / "adapter")
    change_tensors(
        tmp_path / "adapter",
        lambda t: t.update({f"base_model.model.{name}": tensor for name, tensor in head.items()}),
    )
    experts = Experts({"math": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"})
    assert "lm_head.weight" not in experts.store("math")
    experts.bind(linears(tiny.llama(layers=1)))


def test_a_revision_is_one_of_a_hub_id_not_of_a_folder(folder):
    change(folder, base_model_name_or_path=str(folder.parent / "base"), revision="main")
    assert Experts({"math": str(folder)}).expert("math").base.name == "base"
    change(folder, base_model_name_or_path="org/base")
    assert Adapter.open(folder, what="x").base == "org/base@main"


def test_what_changes_no_linear_weight_is_kept_apart_not_refused(folder):
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 260),
        "base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(64),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(64),
    }
    change_tensors(folder, lambda tensors: tensors.update(extra))
    adapter = Adapter.open(folder, what="expert `math`")
    assert len(adapter.unused) == 3 and len(adapter.modules) == 5


def test_a_pickled_adapter_is_never_opened(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle files are never opened" in opened(folder, "EPMQ-F14")


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(folder):
    tiny.llama(layers=1).save_pretrained(folder)
    assert "holds an adapter (`adapter_config.json`) beside a model" in opened(folder)


def test_the_base_must_be_known(folder):
    change(folder, base_model_name_or_path=None)
    with pytest.raises(EPMQInputError, match=r"names no base model.*`base\+adapter`") as caught:
        Experts({"math": str(folder)})
    assert caught.value.code == "EPMQ-F34"
    change(folder, base_model_name_or_path="/of/another/machine")
    with pytest.raises(EPMQInputError, match=r"expert `math`, its base.*`base\+adapter`"):
        Experts({"math": str(folder)})
    base = folder.parent / "base"
    experts = Experts({"math": str(folder)}, base=str(base))
    assert experts.expert("math").base.path == base
    with pytest.raises(EPMQInputError, match="holds no `adapter_config.json`"):
        Experts({"math": f"{base}+{base}"})


def test_adapters_of_one_base_share_it(folder):
    base = folder.parent / "base"
    experts = Experts({"a": f"{base}+{folder}", "b": f"{base}+{folder}"})
    assert experts.store("a") is experts.store("b")
    assert set(experts.folders) == {
        "expert `a`",
        "expert `b`",
        "base of expert `a`",
        "base of expert `b`",
    }


def test_a_plus_in_the_name_of_a_folder_is_no_adapter(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert split_adapter(str(tmp_path / "a+b")) == (str(tmp_path / "a+b"), None)
    assert split_adapter("org/base@v1+org/lora@v2") == ("org/base@v1", "org/lora@v2")
    assert not is_adapter(tmp_path / "a+b", what="x")
    assert split_adapter(f"{tmp_path / 'a+b'}+c+d") == (str(tmp_path / "a+b"), "c+d")


@pytest.mark.parametrize("spec", ["x" * 5000, "~no-such-user/x", "x\0", "~no-such-user/x+y"])
def test_what_can_be_no_path_is_refused(spec):
    with pytest.raises(EPMQInputError, match="neither an existing folder nor a hub id"):
        Experts({"math": spec})


def test_the_scales_are_those_of_peft(folder):
    change(folder, use_rslora=True)
    adapter = Adapter.open(folder, what="x")
    module = "model.layers.0.self_attn.q_proj"
    B = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{module}.lora_B.weight"]
    torch.testing.assert_close(adapter.update(StoredWeight(module)).B, B * 8 / math.sqrt(4))
