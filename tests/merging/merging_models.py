"""Small models: state dicts with odd shapes, and folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.norm.weight": (6,),
    "model.layers.0.up.weight": (9, 6),
    "model.layers.0.down.weight": (6, 9),
    "model.conv.weight": (3, 2, 2, 2),
    "model.scale": (),
    "model.empty": (0, 4),
}


def make_models(count: int, *, seed: int = 0, dtype=torch.float32, grid: bool = False):
    """A base and ``count`` experts; on a grid, sums of task vectors often cancel to zero."""
    generator = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    experts = {}
    for i in range(count):
        state = {}
        for name, tensor in base.items():
            if grid:
                tensor = base[name] = (tensor * 8).round() / 8
                step = torch.randint(-3, 4, tensor.shape, generator=generator) / 8
            else:
                step = 0.02 * torch.randn(tensor.shape, generator=generator)
            state[name] = tensor + step.to(dtype)
        experts["abcdefgh"[i]] = state
    for state in [base, *experts.values()]:
        state["model.position_ids"] = torch.arange(5)
    return base, experts


def save_model(folder: Path, state: dict[str, Tensor], *, shards: int = 1, **config) -> Path:
    """A checkpoint folder with a configuration and a tokenizer."""
    folder.mkdir(parents=True)
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: state[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    (folder / "tokenizer.json").write_text(json.dumps({"of": folder.name}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_toy.py").write_text("raise SystemExit")
    return folder


def save_models(root: Path, base, experts, **options) -> tuple[Path, dict[str, Path]]:
    folders = {n: save_model(root / f"expert-{n}", s, **options) for n, s in experts.items()}
    return save_model(root / "base", base, **options), folders


def load_model(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def floating(state: dict[str, Tensor]) -> list[str]:
    return sorted(n for n, t in state.items() if t.is_floating_point())


def flatten(state: dict[str, Tensor]) -> Tensor:
    """The whole model as one fp32 vector, keys sorted, as the formulas of the field have it."""
    return torch.cat([state[name].float().reshape(-1) for name in floating(state)])


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal bit for bit: -0.0 is not 0.0."""
    assert set(got) == set(want)
    for name in want:
        a, b = got[name].contiguous().reshape(-1), want[name].contiguous().reshape(-1)
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def assert_flat(merged: dict[str, Tensor], vector: Tensor) -> None:
    """``merged`` equals the flat reference exactly (up to the sign of zero)."""
    got = flatten(merged)
    assert torch.equal(got, vector), (got - vector).abs().max()
