"""One small model of each family of language models that GPTQModel and this package know."""

from __future__ import annotations

import tiny
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = dict(
    **tiny.TOKENS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


ROUTED = dict(num_experts_per_tok=2, tie_word_embeddings=False)


def _shape(layers):
    return SHAPE | {"num_hidden_layers": layers}


def opt(layers=1):
    """No shared inputs are declared for it, and its linear layers have biases."""
    shape = dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_attention_heads=4)
    return OPTForCausalLM(
        OPTConfig(**tiny.TOKENS, **shape, num_hidden_layers=layers, max_position_embeddings=64)
    )


def gpt2(layers=1):
    """Its linear layers are stored transposed."""
    shape = dict(n_embd=64, n_layer=layers, n_head=4, n_positions=64, n_inner=96)
    return GPT2LMHeadModel(GPT2Config(**tiny.TOKENS, **shape))


def mixtral(layers=1):
    config = MixtralConfig(**_shape(layers), **ROUTED, num_local_experts=4)
    return MixtralForCausalLM(config)


def qwen3_moe(layers=1):
    routed = ROUTED | dict(head_dim=16, num_experts=4, moe_intermediate_size=32)
    config = Qwen3MoeConfig(**_shape(layers), **routed)
    return Qwen3MoeForCausalLM(config)


def plain(model, config, **options):
    return lambda layers=1: model(config(**_shape(layers), **options))


FAMILIES = {
    "llama": plain(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False),
    "llama, tied": plain(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True),
    "mistral": plain(MistralForCausalLM, MistralConfig, sliding_window=16),
    "qwen2": plain(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False),
    "qwen2, tied": plain(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),
    "qwen3": plain(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True, head_dim=16),
    "gemma": plain(GemmaForCausalLM, GemmaConfig, tie_word_embeddings=True, head_dim=16),
    "gemma, untied": plain(GemmaForCausalLM, GemmaConfig, tie_word_embeddings=False, head_dim=16),
    "phi3": plain(Phi3ForCausalLM, Phi3Config, tie_word_embeddings=False),
    "gpt2": gpt2,
    "opt": opt,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
