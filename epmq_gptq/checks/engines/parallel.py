"""Tensor parallelism: on how many GPUs a quantized model can be spread layer by layer."""

from __future__ import annotations

from collections.abc import Callable

from .facts import Facts, Layer
from .fused import CUT_INPUTS, KEY_VALUES

LARGEST = 64


def max_tensor_parallel(facts: Facts, fits: Callable[[Facts, int], bool]) -> int:
    """The most GPUs (a power of two, 64 at most) that can share every layer and its groups.

    Args:
        fits: what an engine asks besides.
    """
    size = 1
    while size < LARGEST and not obstacle(facts, 2 * size) and fits(facts, 2 * size):
        size *= 2
    return size


def obstacle(facts: Facts, size: int) -> str:
    """What is in the way of ``size`` GPUs; "" if nothing is.

    Sources: vLLM ``config/model.py`` (heads), ``layers/linear.py`` (key-value heads),
    ``kernels/linear/mixed_precision/marlin.py`` (groups); SGLang's copies of them.
    """
    if size == 1:
        return ""
    text = facts.config.get("text_config")
    config = text if isinstance(text, dict) else facts.config
    heads = config.get("num_attention_heads") or config.get("n_head")
    key_values = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(key_values, int):
        return "the configuration does not say how many heads there are"
    if heads % size:
        return f"{heads} attention heads cannot be dealt to {size} GPUs"
    # Where there are fewer key-value heads than GPUs, each is repeated.
    if key_values % size and size % key_values:
        return f"{key_values} key-value heads cannot be dealt to {size} GPUs"
    return next(filter(None, (_cut(layer, size) for layer in facts.layers)), "")


def _cut(layer: Layer, size: int) -> str:
    bits, group_size = layer.settings.bits, layer.settings.group_size
    last = layer.name.rpartition(".")[2]
    if last in CUT_INPUTS:
        # A group that lies in two parts would need its scale twice.
        step = max(group_size, 32)
        if layer.inputs % (size * step):
            return (
                f"the {layer.inputs} inputs of `{layer.name}` cannot be cut into {size} parts of "
                f"whole groups ({step})"
            )
    elif last not in KEY_VALUES and layer.outputs % (size * 32 // bits):
        return (
            f"the {layer.outputs} outputs of `{layer.name}` cannot be cut into {size} parts of "
            f"whole words ({bits} bits)"
        )
    return ""
