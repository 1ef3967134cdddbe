"""Headers: everything that is missing, extra, of other shape or dtype, and what it means."""

import pytest
import torch
from stores import CONFIG, codes, linears, store, tensors

from epmq_gptq.checks.tensors import check_tensors
from epmq_gptq.experts.adapters import Adapter
from epmq_gptq.experts.linears import Linear, StoredWeight
from epmq_gptq.io.state_dicts import StateDict

MERGED = tensors()
Q0 = "model.layers.0.self_attn.q_proj.weight"


def checked(state, config=None, **options):
    return check_tensors(
        store(MERGED), store(state, "x", config), linears(), "expert `x`", **options
    )


def test_a_fine_tune_fits():
    found = checked(tensors(1, like=MERGED))
    assert not found.findings
    assert found.table["linears"] == 6 and found.table["tensors"] == len(MERGED)
    assert found.table["bytes"] == 4 * sum(tensor.numel() for tensor in MERGED.values())


def test_every_misfit_is_an_error_of_its_own():
    state = dict(MERGED)
    del state[Q0]
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(16, 9)
    state["model.layers.1.mlp.down_proj.weight"] = torch.ones(8, 16, dtype=torch.float64)
    found = checked(state)
    assert codes(found.findings, "error") == ["F01", "F03", "F06"]
    assert f"`{Q0}` is missing" in found.findings[0].cause
    assert "(16, 9), the merged model has (16, 8)" in found.findings[1].cause
    assert all(f.subject == "expert `x`" for f in found.findings)
    assert [m["code"] for m in found.table["misfits"]] == ["EPMQ-F01", "EPMQ-F03", "EPMQ-F06"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool]
)
def test_linears_must_be_f32_f16_or_bf16(dtype):
    found = checked({**MERGED, Q0: MERGED[Q0].to(dtype)})
    assert codes(found.findings, "error") == ["F06"]


def test_other_floats_are_read_and_said():
    half = {name: tensor.bfloat16() for name, tensor in MERGED.items()}
    (finding,) = checked(half).findings
    assert (finding.level, finding.code) == ("note", "EPMQ-F06") and "BF16" in finding.cause


def test_extra_tensors_are_counted_and_ignored():
    state = {**MERGED, **{f"vision.{i}.weight": torch.ones(1) for i in range(9)}}
    (finding,) = checked(state).findings
    assert (finding.level, finding.code) == ("warning", "EPMQ-F02")
    assert "9 tensors" in finding.cause and "`vision.4.weight` and 4 more" in finding.cause


def test_a_head_that_is_the_embedding_is_not_extra():
    """A model in memory has its tied head in its state dict, a checkpoint leaves it out."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    merged = {name: tensor for name, tensor in MERGED.items() if name != "lm_head.weight"}

    def found(state, other, config):
        return check_tensors(store(state, config=config), store(other), linears(), "x").findings

    assert not found(merged, MERGED, tied)
    assert codes(found(merged, MERGED, CONFIG)) == ["F02"]
    headless = check_tensors(store(MERGED), store(merged, config=tied), linears(), "x")
    assert not headless.findings and headless.table["missing"] == ["lm_head.weight"]


def test_what_is_not_quantized_and_missing_is_a_note():
    state = {name: tensor for name, tensor in MERGED.items() if "norm" not in name}
    found = checked(state)
    (finding,) = found.findings
    assert (finding.level, finding.code) == ("note", "EPMQ-F01")
    assert "lacks 1 tensor of what is not quantized: `model.norm.weight`" in finding.cause
    assert found.table["missing"] == ["model.norm.weight"]


def test_two_layouts_of_routed_modules_miss_nothing_of_one_another():
    stack = "model.layers.0.mlp.experts"
    layers = [
        Linear(
            f"{stack}.{index}.{part}",
            (4, 8),
            (f"{stack}.{index}.{part}.weight",),
            (StoredWeight(f"{stack}.gate_up_proj", index, half),),
        )
        for index in range(2)
        for half, part in enumerate(("gate_proj", "up_proj"))
    ]
    stacked = store({f"{stack}.gate_up_proj": torch.ones(2, 8, 8)})
    apart = store({linear.tensors[0]: torch.ones(4, 8) for linear in layers})
    for merged, other in ((stacked, apart), (apart, stacked)):
        found = check_tensors(merged, other, layers, "x")
        assert not found.findings
        assert (found.table["missing"], found.table["extra"]) == ([], [])


def test_layers_past_the_last_one_and_too_few_are_errors():
    more = {**MERGED, **{k: v for k, v in tensors(0, 4).items() if ".3." in k or ".2." in k}}
    found = checked(more).findings
    assert codes(found, "error") == ["F04"] and "4 layers under `model.layers`" in found[0].cause
    fewer = {name: tensor for name, tensor in MERGED.items() if ".1." not in name}
    assert codes(checked(fewer).findings, "error") == ["F01"] * 3


def test_rows_of_token_tables_may_differ():
    state = dict(MERGED)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.ones(24, 8)
    state["model.norm.weight"] = torch.ones(9)
    found = checked(state).findings
    assert codes(found) == ["F05", "F05", "F03"] and not codes(found, "error")
    assert "24 rows, the merged model has 20" in found[0].cause


def test_a_quantized_model_is_one_error_not_one_per_layer():
    packed = {"model.layers.0.self_attn.q_proj.qweight": torch.ones(1, 8, dtype=torch.int32)}
    (finding,) = checked(packed).findings
    assert (finding.level, finding.code) == ("error", "EPMQ-F07")
    block = {"quant_method": "bitsandbytes"}
    (finding,) = checked(MERGED, {**CONFIG, "quantization_config": block}).findings
    assert finding.code == "EPMQ-F07" and "bitsandbytes" in finding.cause


def test_an_adapter_is_checked_with_its_base():
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
    adapter = Adapter(options, StateDict(factors, what="x"), what="x")
    assert not checked(MERGED, adapter=adapter).findings
    factors[name.format("A")] = torch.ones(2, 9)
    adapter = Adapter(options, StateDict(factors, what="x"), what="x")
    (finding,) = checked(MERGED, adapter=adapter).findings
    assert (finding.level, finding.code) == ("error", "EPMQ-F34")


def test_a_whole_weight_of_an_adapter_takes_the_place_of_the_bases():
    saved = {f"base_model.model.{Q0}": torch.ones(8, 9)}
    adapter = Adapter(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, StateDict(saved, what="x"), what="x"
    )
    (finding,) = checked(MERGED, adapter=adapter).findings
    assert finding.code == "EPMQ-F03" and "(8, 9)" in finding.cause
