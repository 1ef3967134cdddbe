"""Small stores for the preflight's tests: a two-layer model in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from epmq_gptq.experts.linears import Linear
from epmq_gptq.io.state_dicts import StateDict

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
PARTS = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}


def linears(layers: int = 2) -> list[Linear]:
    """The layers of :func:`tensors`."""
    return [
        Linear(f"model.layers.{i}.{part}", shape, (f"model.layers.{i}.{part}.weight",))
        for i in range(layers)
        for part, shape in PARTS.items()
    ]


def tensors(seed: int = 0, layers: int = 2, *, like=None, size: float = 0.1) -> dict:
    """A state dict; with ``like``, a fine-tune of that one."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "model.embed_tokens.weight": torch.randn(20, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(20, 8, generator=generator),
    }
    for linear in linears(layers):
        noise = torch.randn(linear.shape, generator=generator)
        name = linear.tensors[0]
        state[name] = noise if like is None else like[name] + size * noise
    if like is not None:
        state |= {name: like[name].clone() for name in like if "layers" not in name}
    return state


def average(states: list[dict]) -> dict:
    """The mean of state dicts."""
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def store(state: dict, what: str = "the merged model", config: dict | None = None) -> StateDict:
    """A state dict as a store, with a configuration."""
    return StateDict(state, what=what, config=CONFIG if config is None else config)


def folder(path: Path, state: dict, config: dict | None = None, **files: dict) -> Path:
    """A checkpoint on disk; ``files`` are further JSON files by their stem."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors"
    )
    for name, content in {"config": CONFIG if config is None else config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def codes(findings, level: str | None = None) -> list[str]:
    """The codes of findings, of one level or of all."""
    return [f.code.removeprefix("EPMQ-") for f in findings if level in (None, f.level)]
