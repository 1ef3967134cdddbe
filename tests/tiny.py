"""Small real models for the tests: a Llama, fine-tunes of it that differ by noise, and rows."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Where models are quantized that are loaded here: `make test-gpu` sets "cuda".
DEVICE = os.environ.get("EPMQ_TEST_DEVICE", "cpu")
VOCABULARY = 260
# Tensors of `llama`.
V_PROJ = "model.layers.0.self_attn.v_proj"
EMBEDDING = "model.embed_tokens.weight"
TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens that GPTQModel asks for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {byte: index + 4 for index, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def llama(layers: int = 2, hidden: int = 64, **shape: int) -> LlamaForCausalLM:
    """A Llama with grouped-query attention; ``shape`` overrides any option of its configuration."""
    torch.manual_seed(0)
    options = dict(
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    config = LlamaConfig(
        **TOKENS, hidden_size=hidden, num_hidden_layers=layers, **(options | shape)
    )
    return LlamaForCausalLM(config).eval()


def load(merged: Path, config):
    """A model to be quantized, computing in float32."""
    from gptqmodel import GPTQModel

    from epmq_gptq import install

    install()
    return GPTQModel.load(str(merged), config, dtype=torch.float32, device=DEVICE)


def reload(folder: Path):
    """A quantized checkpoint under the host's torch kernel, which knows half precision only."""
    from gptqmodel import GPTQModel

    from epmq_gptq import install

    install()
    return GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend="gptq_torch")


def save(model: PreTrainedModel, folder: Path, **options) -> Path:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder, **options)
    if isinstance(model, MixtralForCausalLM):
        # Once GPTQModel has taken a Mixtral apart, no Mixtral of this process is saved whole.
        save_file(_published(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def _published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral's weights under the names of published checkpoints, from stacks or taken apart."""
    tensors = {}
    for name, tensor in state.items():
        stack, _, leaf = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".experts.")
        if leaf == "down_proj":
            parts = {f"{i}.w2.weight": W for i, W in enumerate(tensor)}
        elif leaf == "gate_up_proj":
            halves = [W.chunk(2) for W in tensor]
            parts = {f"{i}.w1.weight": gate for i, (gate, _) in enumerate(halves)}
            parts |= {f"{i}.w3.weight": up for i, (_, up) in enumerate(halves)}
        else:
            for old, new in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                leaf = leaf.replace(f".{old}.", f".{new}.")
            tensors[f"{stack}.experts.{leaf}" if stack else leaf] = tensor.contiguous()
            continue
        tensors |= {f"{stack}.experts.{part}": W.clone() for part, W in parts.items()}
    return tensors


@torch.no_grad()
def perturbed(model: PreTrainedModel, seed: int, size: float = 0.3) -> dict[str, torch.Tensor]:
    """A state dict whose linear weights moved by ``size`` of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim >= 2 and "embed" not in name and "lm_head" not in name:
            tensor += size * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return state


def family(
    folder: Path, experts: int = 3, *, model: PreTrainedModel | None = None, size: float = 0.3
) -> tuple[Path, dict[str, Path]]:
    """Save fine-tunes of one base and their average. Returns the merge and the experts."""
    model = llama() if model is None else model
    states = [perturbed(model, seed=100 + index, size=size) for index in range(experts)]
    paths = {}
    for index, state in enumerate(states):
        model.load_state_dict(state)
        paths[f"expert{index}"] = save(model, folder / f"expert{index}")
    merged = {name: sum(state[name] for state in states) / experts for name in states[0]}
    model.load_state_dict(merged)
    return save(model, folder / "merged"), paths


def rows(count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Random token rows; every seed favours other tokens, so that experts see other inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(VOCABULARY, generator=generator) ** 6
    weights[:4] = 0
    return [
        {
            "input_ids": torch.multinomial(
                weights, length, replacement=True, generator=generator
            ).tolist()
        }
        for _ in range(count)
    ]


def poison(folder, tensor, index, value=float("nan")):
    """Write a value into a tensor of a saved model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor][index] = value
    save_file(tensors, file, metadata={"format": "pt"})
