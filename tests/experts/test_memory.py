"""Experts in memory: the same checkpoint as from a folder, and never a copy of their weights."""

import copy
import json

import pytest
import tiny
import torch
from judge import stored
from lora import peft_model

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.experts.in_memory import in_memory
from epmq_gptq.io.checkpoints import Checkpoint
from epmq_gptq.io.state_dicts import StateDict


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, paths = tiny.family(folder, experts=2)
    return merged, {"a": paths["expert0"], "b": paths["expert1"]}


def quantized(merged, experts, out, rows=None):
    rows = rows or {name: tiny.rows(4, 40, seed=i) for i, name in enumerate(experts)}
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1))
    model.quantize(rows, batch_size=2)
    model.save(str(out))
    return stored(out), json.loads((out / "quantize_config.json").read_text())["meta"]["epmq"]


@pytest.fixture(scope="module")
def from_folders(family, tmp_path_factory):
    return quantized(*family, tmp_path_factory.mktemp("out") / "plain")


def module(path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_a_model_in_memory_gives_the_checkpoint_of_its_folder(form, family, from_folders, tmp_path):
    merged, paths = family
    model = module(paths["b"])
    given = model if form == "module" else model.state_dict()
    tensors, record = quantized(merged, {"a": paths["a"], "b": given}, tmp_path / "out")
    expected, _ = from_folders
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert record["experts"][1]["source"] == "in memory" and record["experts"][1]["sha256"]


def test_a_peft_model_in_memory_gives_the_checkpoint_of_its_folders(family, tmp_path):
    merged, paths = family
    tiny.save(tiny.llama(), tmp_path / "base")
    model = peft_model(tiny.llama(), modules_to_save=["up_proj"])
    model.save_pretrained(tmp_path / "adapter")
    spec = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    expected, _ = quantized(merged, {"a": paths["a"], "b": spec}, tmp_path / "folders")
    tensors, record = quantized(merged, {"a": paths["a"], "b": model}, tmp_path / "memory")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert record["experts"][1]["adapter_of"]["source"] == "in memory"
    # The model is the user's: nothing of it was merged, moved or renamed.
    again = model.state_dict()
    assert any("lora_A" in name for name in again)


def test_nothing_is_copied_with_the_configuration(family):
    weights = module(family[1]["a"]).state_dict()
    config = EPMQConfig(experts={"a": weights})
    held = copy.deepcopy(config).experts["a"]
    assert held is config.experts["a"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert held.store.read(name).data_ptr() == weights[name].data_ptr()
    assert "tensor" not in repr(config).replace("tensors in memory", "").lower()
    with pytest.raises(EPMQInputError, match=r"`experts` cannot be written.*a model in memory"):
        config.to_json()


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({}, "EPMQ-F15", "the state dict is empty"),
        ({"w": [1.0]}, "EPMQ-F15", "should map names to tensors, got list under 'w'"),
        ({"w": torch.ones(2, device="meta")}, "EPMQ-F15", "`w` is on the meta device"),
    ],
)
def test_what_holds_no_weights_is_refused(given, code, message):
    with pytest.raises(EPMQInputError, match=message) as caught:
        EPMQConfig(experts={"math": given})
    assert caught.value.code == code and "expert `math`" in str(caught.value)


def test_which_adapter_is_meant_must_be_clear():
    model = peft_model(tiny.llama(layers=1))
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(EPMQInputError, match=r"has the adapters \['default', 'second'\]"):
        in_memory(model, what="expert `math`")
    model.delete_adapter("second")
    model.merge_adapter()
    with pytest.raises(EPMQInputError, match="merged into its base at the moment"):
        in_memory(model, what="expert `math`")


def wrappers():
    def inner_compiled(model):
        model.get_decoder().layers[0] = torch.compile(model.get_decoder().layers[0])
        return model

    return {
        "compiled": torch.compile,
        "data parallel": torch.nn.DataParallel,
        "both": lambda model: torch.nn.DataParallel(torch.compile(model)),
        "one layer compiled": inner_compiled,
    }


@pytest.mark.parametrize("wrap", wrappers())
@pytest.mark.parametrize("form", ["module", "state dict", "peft"])
def test_what_wraps_a_model_changes_no_name(form, wrap):
    model = tiny.llama(layers=1)
    if form == "peft":
        model = peft_model(model)
    plain = in_memory(model, what="x")
    wrapped = wrappers()[wrap](model)
    taken = in_memory(wrapped.state_dict() if form == "state dict" else wrapped, what="x")
    assert set(taken.store) == set(plain.store)
    assert taken.store.digest() == plain.store.digest()
    if form == "peft":
        assert taken.adapter.modules and taken.adapter.modules == plain.adapter.modules


def test_an_adapter_that_is_switched_off_is_refused():
    from peft import LoraConfig

    model = tiny.llama(layers=1)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    assert in_memory(model, what="x").adapter.modules == ["model.layers.0.self_attn.q_proj"]
    model.disable_adapters()
    with pytest.raises(EPMQInputError, match="adapter is disabled at the moment"):
        in_memory(model, what="expert `math`")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, 2).as_subclass(type("Sharded", (torch.Tensor,), {})), "Sharded"),
    ],
)
def test_a_tensor_that_cannot_be_read_alone_is_refused(tensor, kind):
    with pytest.raises(EPMQInputError, match=rf"`w` is a {kind}, not a plain") as caught:
        EPMQConfig(experts={"math": {"w": tensor}})
    assert caught.value.code == "EPMQ-F06"


def test_the_state_dict_of_a_peft_model_does_not_say_enough():
    given = peft_model(tiny.llama(layers=1)).state_dict()
    with pytest.raises(EPMQInputError, match="that of a PEFT model.* Give the PEFT model itself"):
        in_memory(given, what="expert `math`")


def test_a_quantized_or_foreign_state_dict_is_refused(family):
    merged, paths = family
    weights = module(paths["a"]).state_dict()
    rows = {"a": tiny.rows(2, 20, seed=0)}
    name = "model.layers.0.mlp.up_proj"
    cases = [
        (weights | {f"{name}.qweight": torch.ones(1)}, "EPMQ-F07", "already quantized"),
        (weights | {f"{name}.weight": torch.ones(128, 64).byte()}, "EPMQ-F06", "dtype U8"),
        (weights | {f"{name}.weight": torch.ones(9, 64)}, "EPMQ-F03", r"has shape \(9, 64\)"),
        ({"lm_head.weight": torch.ones(260, 64)}, "EPMQ-F01", "q_proj.weight` is missing"),
    ]
    for given, code, message in cases:
        model = tiny.load(merged, EPMQConfig(group_size=32, experts={"a": given}))
        with pytest.raises(EPMQInputError, match=message) as caught:
            model.quantize(rows)
        assert caught.value.code == code


def test_a_state_dict_reads_like_the_checkpoint_of_it(family):
    path = family[1]["a"]
    on_disk, in_ram = Checkpoint(path, what="x"), StateDict(module(path).state_dict(), what="x")
    for name in on_disk:
        one, other = on_disk.info(name), in_ram.info(name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(on_disk.read(name), in_ram.read(name))
        assert torch.equal(on_disk.read_rows(name, 1, 4), in_ram.read_rows(name, 1, 4))
    changed = {name: tensor.clone() for name, tensor in module(path).state_dict().items()}
    assert StateDict(changed, what="x").digest() == in_ram.digest()
    changed["model.norm.weight"][0] += 1
    assert StateDict(changed, what="x").digest() != in_ram.digest()
