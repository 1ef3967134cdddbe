"""One linear layer as the merged model has it, and where a checkpoint may hold its weight."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Whole = TypeVar("Whole", torch.Tensor, tuple)


def name_in_layer(module: str) -> str:
    """The name of a module within its layer, which is how the host calls it."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


@dataclass(frozen=True)
class StoredWeight:
    """Where a checkpoint may hold one layer's weight.

    Attributes:
        tensor: name of the tensor.
        index: which entry along its first axis (routed modules stacked in one tensor), or None.
        part: which half of the rows (0 gate, 1 up of a joined projection), or None.
    """

    tensor: str
    index: int | None = None
    part: int | None = None


@dataclass(frozen=True)
class Linear:
    """One linear layer that will be quantized, as the merged model has it.

    Attributes:
        name: full name of the module.
        shape: of its weight as it is stored.
        tensors: names under which a checkpoint may hold exactly this weight, most likely first.
        joined: larger tensors of which it may be a piece, tried after ``tensors``.
        transposed: whether it is stored ``(in, out)`` (transformers' Conv1D).
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    joined: tuple[StoredWeight, ...] = ()
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Rows of the weight ``W: (out, in)``."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the weight ``W: (out, in)``."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def stored(self) -> tuple[StoredWeight, ...]:
        """Every place to look for the weight, most likely first."""
        return (*(StoredWeight(name) for name in self.tensors), *self.joined)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, or transformers' ``Conv1D``."""
    return isinstance(module, torch.nn.Linear) or is_transposed(module)


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether a module keeps its weight as ``(in, out)``: transformers' ``Conv1D`` (GPT-2)."""
    from transformers import Conv1D

    return isinstance(module, Conv1D)


def resolve(linear: Linear, store: Container[str]) -> StoredWeight | None:
    """The first place of ``linear.stored`` whose tensor ``store`` has, or None."""
    return next((place for place in linear.stored if place.tensor in store), None)


def piece(whole: Whole | Sequence[int], stored: StoredWeight) -> Whole:
    """The part of a tensor, or of its shape, that ``stored`` means; a view, nothing is copied.

    Args:
        whole: the tensor named ``stored.tensor``, or its shape. A shape that has no such part (no
            entry of that index, an odd number of rows) comes back with an axis of zero, which fits
            no layer.
    """
    if isinstance(whole, torch.Tensor):
        if stored.index is not None:
            whole = whole[stored.index]
        if stored.part is not None:
            half = whole.shape[0] // 2
            whole = whole[stored.part * half : (stored.part + 1) * half]
        return whole
    shape = tuple(whole)
    if stored.index is not None:
        shape = shape[1:] if shape and stored.index < shape[0] else (0, *shape[1:])
    if stored.part is not None:
        rows = shape[0] if shape else 0
        shape = (0 if rows % 2 else rows // 2, *shape[1:])
    return shape


ROUTED = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)")


def is_routed(name: str) -> bool:
    """Whether a linear layer, by its full name, is given the tokens that a router chose for it."""
    return ROUTED.fullmatch(name) is not None
