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
    """The hidden states among a module's arguments: the first floating tensor of two or three axes.

    Two, ``(B · S, d)``, where a layer takes its tokens apart (OPT).
    """
    for value in (*arguments, *options.values()):
        if isinstance(value, Tensor) and value.dim() in (2, 3) and value.is_floating_point():
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

    Returns:
        The layers that are known to write; none where the output is not finite.
    """
    seen = _Seen()
    hooks = []
    for name, module in layer.named_modules():
        if name in linears:
            hooks.append(module.register_forward_hook(seen.output_of(name)))
        elif not isinstance(module, nn.ModuleList):
            hook = module.register_forward_pre_hook(seen.input_of(name), with_kwargs=True)
            hooks.append(hook)
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    states = (output[0] if isinstance(output, tuple) else output)[:1].cpu()
    if not bool(torch.isfinite(states).all()):
        return {}
    streams = {name: x for name, x in seen.given.items() if x.shape == states.shape}
    after = [*streams.values(), states]
    taps = {}
    for name, y in seen.written.items():
        if y.shape != states.shape:
            continue
        # A norm rather than the layer: it is given the stream in one way only.
        for tap in sorted(streams, key=lambda tap: tap.count("."), reverse=True):
            if tap and any(_is_sum(x, streams[tap], y) for x in after):
                taps[name] = tap
                break
    return taps


class _Seen:
    """The first row of what modules are given and of what linear layers write: ``(1, S, d)``."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}
        self._length = 0

    def input_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, options: dict) -> None:
            states = first_states(arguments, options)
            if states is not None:
                self._length = self._length or states.shape[1]  # the layer itself comes first
                self.given[name] = self._first_row(states)

        return hook

    def output_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            self.written[name] = self._first_row(output)

        return hook

    def _first_row(self, states: Tensor) -> Tensor:
        row = states.detach()
        row = row[:1] if row.dim() == 3 else row[None, : self._length]
        return row.to("cpu", copy=True)


def _is_sum(total: Tensor, stream: Tensor, y: Tensor) -> bool:
    eps = 4 * torch.finfo(total.dtype).eps
    atol = eps * float(total.abs().mean())

    def equal(other: Tensor) -> float:
        return float(torch.isclose(total, other, rtol=eps, atol=atol).float().mean())

    return equal(stream + y) >= _SHARE and equal(stream) < _SHARE
