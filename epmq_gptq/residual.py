"""Which linear layers of a layer write to its residual stream, found by running it once.

No table of architectures: a linear layer writes to the stream where what some module is given next,
or what the layer returns, is what an earlier module was given plus this layer's output. So layers
that are scaled, normalised or gated before the addition, or that run side by side, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

# Of the entries of a sum, how many must be equal but for rounding.
_SHARE = 0.99


def first_states(arguments: tuple, options: dict[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments: the first floating tensor of three axes."""
    for value in (*arguments, *options.values()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return value
    return None


def residual_taps(
    layer: nn.Module, linears: Collection[str], run: Callable[[], Any]
) -> dict[str, str]:
    """Linear layer → the module whose input is the stream that its output is added to.

    One row of the batch decides.

    Args:
        layer: the layer; names are relative to it, ``""`` being the layer itself.
        linears: names of its linear layers.
        run: runs a batch through the layer and returns its output.
    """
    given: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    hooks = []
    for name, module in layer.named_modules():
        if name in linears:
            hooks.append(module.register_forward_hook(_output_of(written, name)))
        elif not isinstance(module, nn.ModuleList):
            hooks.append(module.register_forward_pre_hook(_input_of(given, name), with_kwargs=True))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    states = (output[0] if isinstance(output, tuple) else output)[:1]
    streams = {name: x for name, x in given.items() if x.shape == states.shape}
    after = [*streams.values(), states]
    taps = {}
    for name, y in written.items():
        if y.shape != states.shape:
            continue
        # A norm rather than the layer: it is given the stream in one way only.
        for tap in sorted(streams, key=lambda tap: tap.count("."), reverse=True):
            if tap and any(_is_sum(x, streams[tap], y) for x in after):
                taps[name] = tap
                break
    return taps


def _is_sum(total: Tensor, stream: Tensor, y: Tensor) -> bool:
    eps = 4 * torch.finfo(total.dtype).eps
    atol = eps * float(total.abs().mean())

    def equal(other: Tensor) -> float:
        return float(torch.isclose(total, other, rtol=eps, atol=atol).float().mean())

    return equal(stream + y) >= _SHARE and equal(stream) < _SHARE


def _input_of(given: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple, options: dict) -> None:
        states = first_states(arguments, options)
        if states is not None:
            given[name] = states.detach()[:1].clone()

    return hook


def _output_of(written: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        written[name] = output.detach()[:1].clone()

    return hook
