"""Mixture-of-experts layers: routed modules get targets of their own, rare ones keep the merge."""

from __future__ import annotations

import pytest
import tiny
import torch
from judge import nearest_share
from safetensors import safe_open
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from epmq_gptq import EPMQConfig

SHARED = dict(
    **tiny.TOKENS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2)
    ).eval()


def qwen2_moe():
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SHARED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    ).eval()


def family(model, tmp_path):
    """Two experts of the merge, which are not the experts of the mixture."""
    return tiny.family(tmp_path, experts=2, model=model)


def quantize(merged, experts, rows, bits=4, **options):
    config = EPMQConfig(profile="paper", bits=bits, group_size=32, experts=experts, alpha=0.1)
    model = tiny.load(merged, config)
    return model, model.quantize(rows, **options)["epmq"]


@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_routed_modules_are_quantized_towards_the_experts(build, tmp_path):
    merged, experts = family(build(), tmp_path)
    # Of two lengths: no padding token may be counted where no attention mask reaches.
    rows = {
        name: tiny.rows(3, 40, seed=index) + tiny.rows(4, 25, seed=9 + index)
        for index, name in enumerate(experts)
    }
    model, report = quantize(merged, experts, rows, bits=8, batch_size=4)
    routed = [m for m in report.modules if ".experts." in m.module]
    assert len(routed) == 4 * 3
    total = sum(report.tokens.values())
    for name in ("gate_proj", "up_proj", "down_proj"):
        counted = [sum(m.tokens.values()) for m in routed if m.module.endswith(name)]
        assert sum(counted) == 2 * total  # two routed modules per token
    with_tokens = [m for m in routed if m.target == "experts"]
    assert with_tokens and all(m.excess < 0.1 * m.merge_excess for m in with_tokens)
    model.save(str(tmp_path / "out"))
    loaded = tiny.reload(tmp_path / "out")
    with torch.no_grad():
        logits = loaded.model(torch.tensor([rows["expert0"][0]["input_ids"]])).logits
    assert torch.isfinite(logits).all()


def test_routed_inputs_are_not_paired_where_as_many_tokens_were_routed(tmp_path):
    """Of every token each module is given all, yet in an order that is its router's own."""
    torch.manual_seed(0)
    routed = dict(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32, head_dim=16)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHARED, **routed)).eval()
    merged, experts = family(model, tmp_path)
    rows = {name: tiny.rows(4, 40, seed=index) for index, name in enumerate(experts)}
    reports = []
    for form in (dict(eta=1, rho=1), dict(eta=0, rho=0)):
        options = dict(group_size=32, alpha=0.1, dynamic={"-:.*self_attn.*": {}}) | form
        model = tiny.load(merged, EPMQConfig(experts=experts, **options))
        reports.append(model.quantize(rows)["epmq"])
    for name in ("gate_proj", "up_proj"):
        own, paper = ([m for m in report.modules if m.module.endswith(name)] for report in reports)
        assert len(own) == 4
        assert [m.merge_excess for m in own] == pytest.approx([m.merge_excess for m in paper])


def test_a_routed_module_without_tokens_keeps_the_merged_weight(tmp_path):
    merged, experts = family(qwen2_moe(), tmp_path)
    # One token, the same everywhere: two routed modules see all of it, two see nothing.
    rows = {name: [{"input_ids": [17] * 30}] for name in experts}
    quantized, report = quantize(merged, experts, rows)
    unseen = [m for m in report.modules if m.target == "merged"]
    assert {m.module.rsplit(".", 1)[1] for m in unseen} == {"gate_proj", "up_proj", "down_proj"}
    assert len(unseen) == 2 * 3
    assert all("no calibration token" in m.reason and not m.tokens for m in unseen)
    quantized.save(str(tmp_path / "out"))
    loaded = tiny.reload(tmp_path / "out")
    for module in unseen:
        W = loaded.model.get_submodule(module.module).dequantize_weight().T.float()
        with safe_open(merged / "model.safetensors", "pt") as reader:
            W_m = reader.get_tensor(f"{module.module}.weight")
        assert nearest_share(W, W_m, group_size=32) > 0.95


def test_a_routed_module_with_few_tokens_keeps_the_merged_weight_as_its_target(tmp_path):
    merged, experts = family(qwen2_moe(), tmp_path)
    rows = {name: tiny.rows(6, 40, seed=index) for index, name in enumerate(experts)}
    config = EPMQConfig(
        profile="paper",
        bits=4,
        group_size=32,
        experts=experts,
        alpha=0.1,
        fallback={"threshold": 100},
    )
    model = tiny.load(merged, config)
    report = model.quantize(rows)["epmq"]
    for module in report.modules:
        count = sum(module.tokens.values())
        routed = ".experts." in module.module
        assert (module.target == "merged") == (routed and count < 100), module
        if module.target == "merged" and count:
            assert f"only {count} calibration tokens" in module.reason
            assert module.merge_excess == 0.0
