"""Judges that share no code with the package: the saved file unpacked, GPTQ in float64."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as it is stored."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}
    return tensors


def codes(folder: Path) -> dict[str, torch.Tensor]:
    """The codes ``(in, out)`` of every quantized layer of a 2, 4 or 8 bit GPTQ checkpoint."""
    bits = json.loads((folder / "quantize_config.json").read_text())["bits"]
    shifts = torch.arange(0, 32, bits)
    unpacked = {}
    for name, words in stored(folder).items():  # qweight: (in * bits / 32, out)
        if name.endswith(".qweight"):
            spread = (words[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
            unpacked[name.removesuffix(".qweight")] = spread.reshape(-1, words.shape[1])
    return unpacked


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight of a GPTQ (v1) checkpoint of 2, 4 or 8 bits, ``(out, in)`` float64."""
    bits = json.loads((folder / "quantize_config.json").read_text())["bits"]
    shifts = torch.arange(0, 32, bits)
    tensors = stored(folder)
    weights = {}
    for module, code in codes(folder).items():
        words = tensors[f"{module}.qzeros"]  # (groups, out * bits / 32), stored minus one
        zeros = (words[:, :, None] >> shifts) & (2**bits - 1)
        zeros = (zeros.reshape(words.shape[0], -1) + 1) & (2**bits - 1)
        groups = tensors[f"{module}.g_idx"].long()
        scales = tensors[f"{module}.scales"].double()
        weights[module] = ((code - zeros[groups]).double() * scales[groups]).T.contiguous()
    return weights


def linear_inputs(
    dense: Path, weights: dict[str, torch.Tensor], rows: dict[str, list]
) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs ``(tokens, in)`` float64 of every linear layer, per expert's rows, when the model
    ``dense`` runs with ``weights`` in place of its own.

    A layer's input depends only on what lies before it, so in the fully quantized model it is the
    one that the layer saw when it was quantized.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    modules = {name: model.get_submodule(name) for name in weights}
    for name, module in modules.items():
        module.weight.data = weights[name].clone()
    inputs: dict[str, dict[str, list]] = {name: {} for name in weights}
    current = ""

    def catch(name):
        def hook(module, arguments, output):
            inputs[name].setdefault(current, []).append(arguments[0].flatten(0, -2))

        return hook

    for name, module in modules.items():
        module.register_forward_hook(catch(name))
    with torch.no_grad():
        for current, expert_rows in rows.items():  # noqa: B007 (the hook reads it)
            for row in expert_rows:
                model(torch.tensor([row["input_ids"]]))
    return {
        name: {expert: torch.cat(pieces) for expert, pieces in found.items()}
        for name, found in inputs.items()
    }


def gptq64(
    W: torch.Tensor,
    H: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    order: torch.Tensor | None = None,
    block: int = 128,
) -> torch.Tensor:
    """GPTQ in float64, symmetric grid, written from the algorithm (arXiv 2210.17323).

    Args:
        W: ``(out, in)`` what is rounded.
        H: ``(in, in)`` its curvature.
        order: columns in the order in which they are rounded; groups are taken in that order.
        block: columns whose updates are applied to the rest at once; a group's grid is made from
            the weights as they are when its block begins, as in GPTQModel.
    """
    order = torch.arange(W.shape[1]) if order is None else order
    W = W.double()[:, order].clone()
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()[order][:, order]), upper=True)
    Q = torch.zeros_like(W)
    levels = 2**bits - 1
    for first in range(0, W.shape[1], block):
        last = min(first + block, W.shape[1])
        active = W[:, first:last].clone()
        errors = torch.zeros_like(active)
        for j in range(last - first):
            if (first + j) % group_size == 0:
                group = W[:, first + j : first + j + group_size]
                scale = 2 * group.abs().amax(1) / levels
                scale = torch.where(scale == 0, torch.full_like(scale, 2.0 / levels), scale)
            code = (active[:, j] / scale).round() + (levels + 1) / 2
            Q[:, first + j] = (code.clamp(0, levels) - (levels + 1) / 2) * scale
            errors[:, j] = (active[:, j] - Q[:, first + j]) / U[first + j, first + j]
            active[:, j:] -= errors[:, j : j + 1] * U[first + j, first + j : last]
        W[:, last:] -= errors @ U[first:last, last:]
    return Q[:, torch.argsort(order)]


def nearest_share(W: torch.Tensor, W_m: torch.Tensor, *, group_size: int) -> float:
    """The share of 4-bit weights that lie within half a step of ``W_m: (out, in)``.

    Rounded to nearest that is nearly all: the largest positive weight of a group may lie one step
    outside the symmetric grid.
    """
    groups = W_m.reshape(W_m.shape[0], -1, group_size)
    step = groups.abs().amax(-1, keepdim=True) * 2 / 15
    distance = (W.reshape(groups.shape) - groups).abs()
    return float((distance <= 0.51 * step + 1e-4).float().mean())
