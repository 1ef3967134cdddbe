"""Families besides Llama that go through the same path."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from epmq_gptq import EPMQConfig


def qwen3():
    return Qwen3ForCausalLM(
        Qwen3Config(
            **tiny.TOKENS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


def opt():
    """No shared inputs are declared for it, and its linear layers have biases."""
    return OPTForCausalLM(
        OPTConfig(
            **tiny.TOKENS,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        )
    )


def gpt2():
    """Its linear layers are stored transposed."""
    return GPT2LMHeadModel(
        GPT2Config(**tiny.TOKENS, n_embd=64, n_layer=1, n_head=4, n_positions=128, n_inner=128)
    )


@pytest.mark.parametrize("build", [qwen3, opt, gpt2])
def test_the_same_way_for_other_families(build, tmp_path):
    torch.manual_seed(0)
    merged, experts = tiny.family(tmp_path, experts=2, model=build().eval())
    rows = {name: tiny.rows(5, 50, seed=index) for index, name in enumerate(experts)}
    config = EPMQConfig(bits=8, group_size=32, experts=experts, alpha=0.1)
    model = tiny.load(merged, config)
    report = model.quantize(rows, batch_size=2)["epmq"]
    assert all(m.target == "experts" and m.excess < 0.2 * m.merge_excess for m in report.modules)
    model.save(str(tmp_path / "out"))
    loaded = tiny.reload(tmp_path / "out")
    with torch.no_grad():
        logits = loaded.model(torch.tensor([rows["expert0"][0]["input_ids"]])).logits
    assert torch.isfinite(logits).all()
