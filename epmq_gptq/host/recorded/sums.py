"""The sums of one expert over one input as they are stored, for the solver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...method.half import PackedDelta, PackedGram, pack_delta, pack_gram, unpack_delta, unpack_gram
from ...method.statistics import Moments


class LayerSums(NamedTuple):
    """Of one linear layer.

    Attributes:
        delta: D of this expert, not weighted; None where it is exactly zero.
        outputs: ``(out,)`` Σ (T − b_m − W_m x), or None where no bias was wanted.
        lack: Σ‖(W_i − W_m) x‖², or None where that is not what D is of.
    """

    delta: PackedDelta | None
    outputs: torch.Tensor | None
    lack: float | None


class ExpertSums(NamedTuple):
    """Of one expert, over one input, of the rows that are fitted to or of those held out.

    Attributes:
        tokens: that were counted.
        gram: H of this expert, not weighted.
        inputs: ``(d,)`` Σ x, or None where no bias was wanted.
        layers: full name → sums of that layer.
    """

    tokens: int
    gram: PackedGram
    inputs: torch.Tensor | None
    layers: dict[str, LayerSums]

    @classmethod
    def of(
        cls, tokens: int, moments: Mapping[str, Moments], lacks: Mapping[str, float | None]
    ) -> ExpertSums:
        """Pack the moments of layers of one input; all hold the same ``H``."""
        first = next(iter(moments.values()))
        gram = pack_gram(first.H)
        layers = {}
        for name, one in moments.items():
            delta = None if one.D is None else pack_delta(one.D, gram.norms)
            outputs = None if one.outputs is None else one.outputs.cpu()
            layers[name] = LayerSums(delta, outputs, lacks.get(name))
        inputs = None if first.inputs is None else first.inputs.cpu()
        return cls(tokens, gram, inputs, layers)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of it."""
        found = {"gram.norms": self.gram.norms, "gram.cosines": self.gram.cosines}
        if self.inputs is not None:
            found["inputs"] = self.inputs
        for name, layer in self.layers.items():
            if layer.delta is not None:
                found[f"{name}/delta.sizes"] = layer.delta.sizes
                found[f"{name}/delta.values"] = layer.delta.values
            if layer.outputs is not None:
                found[f"{name}/outputs"] = layer.outputs
        return found

    @classmethod
    def from_tensors(
        cls,
        tokens: int,
        tensors: Mapping[str, torch.Tensor],
        lacks: Mapping[str, float | None],
    ) -> ExpertSums:
        """The inverse of :meth:`tensors`; ``lacks`` names all layers."""
        layers = {}
        for name, lack in lacks.items():
            delta = None
            if f"{name}/delta.values" in tensors:
                delta = PackedDelta(tensors[f"{name}/delta.sizes"], tensors[f"{name}/delta.values"])
            layers[name] = LayerSums(delta, tensors.get(f"{name}/outputs"), lack)
        gram = PackedGram(tensors["gram.norms"], tensors["gram.cosines"])
        return cls(tokens, gram, tensors.get("inputs"), layers)


class RecordedStatistics:
    """What ``GroupStatistics`` gives the solver, from the sums of one expert as they are stored.

    Args:
        expert: its name.
        sums: of that expert.
        weight: β_i, which the stored sums are without.
        device: where the numbers go.
    """

    sample = None

    def __init__(
        self, expert: str, sums: ExpertSums, weight: float, device: torch.device | str = "cpu"
    ):
        self.device = torch.device(device)
        self.tokens = {expert: sums.tokens}
        self._sums, self._weight = sums, weight

    def gram(self) -> torch.Tensor:
        """``β_i H_i: (d, d)`` fp32."""
        H = unpack_gram(self._sums.gram, self.device)
        return H if self._weight == 1 else H.mul_(self._weight)

    def take(self, member: str, H: torch.Tensor, W_m: torch.Tensor | None = None) -> Moments:
        """All that is known of one layer, ``H`` being :meth:`gram`."""
        layer, weight = self._sums.layers[member], self._weight
        count = weight * self._sums.tokens
        D = None
        if layer.delta is not None:
            D = unpack_delta(layer.delta, self._sums.gram.norms, self.device)
            D = D if weight == 1 else D.mul_(weight)
        if self._sums.inputs is None:
            return Moments(H, D, count=count)
        inputs = self._sums.inputs.to(self.device) * weight
        return Moments(H, D, inputs, layer.outputs.to(self.device) * weight, count)
