"""AWQ's scaling groups of a T5 block.

AWQ scales the input channels of some layers up and what comes before them down. The host looks for
that by the order of a block's modules and runs whole attention modules to measure the error; both
fail for T5, whose attention needs position biases and whose keys and values read the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gptqmodel.quantization.awq.quantize import scale
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

# The host scales norms it knows by class. T5's has a weight, no bias, and multiplies by it last.
if T5LayerNorm not in scale.allowed_norms:
    scale.allowed_norms.append(T5LayerNorm)

Group = tuple[torch.nn.Module, list[torch.nn.Linear]]


class _SideBySide(torch.nn.Module):
    """Layers that read one input, as one module: the error of AWQ is that of all their outputs."""

    def __init__(self, layers: list[torch.nn.Linear]):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(hidden_states) for layer in self.layers], dim=-1)


def scaling_groups(
    block: T5Block, inputs: dict[str, torch.Tensor], config: Any
) -> list[dict[str, Any]]:
    """The groups as the host's AWQ takes them.

    Keys and values of the cross-attention are in none: their input is the encoder's result, which
    all decoder blocks share, so that no block may scale it. They are rounded unscaled.

    Args:
        inputs: name of a layer → its calibration inputs ``(1, tokens, in)``.
        config: of the model.
    """
    names = {module: name for name, module in block.named_modules()}
    groups = []
    for before, layers in _groups(block, config):
        feature = names[layers[0]]
        if feature in inputs:
            groups.append(
                {
                    "prev_op": before,
                    "layers": layers,
                    "inp": inputs[feature],
                    "module2inspect": layers[0] if len(layers) == 1 else _SideBySide(layers),
                    "_input_feature_name": feature,
                }
            )
    return groups


def _groups(block: T5Block, config: Any) -> Iterator[Group]:
    """What comes before, and the layers behind it."""
    first = block.layer[0]
    attention = first.SelfAttention
    yield first.layer_norm, [attention.q, attention.k, attention.v]
    yield attention.v, [attention.o]
    if block.is_decoder:
        cross = block.layer[1].EncDecAttention
        yield block.layer[1].layer_norm, [cross.q]
        yield cross.v, [cross.o]
    last = block.layer[-1]
    feed_forward = last.DenseReluDense
    if config.is_gated_act:
        yield last.layer_norm, [feed_forward.wi_0, feed_forward.wi_1]
        yield feed_forward.wi_1, [feed_forward.wo]
    else:
        yield last.layer_norm, [feed_forward.wi]
        if config.dense_act_fn == "relu":  # lets a positive factor through
            yield feed_forward.wi, [feed_forward.wo]
