"""One linear layer as the merged model has it, and where a checkpoint may hold its weight."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch


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


def resolve(linear: Linear, store: Container[str]) -> StoredWeight | None:
    """The first place of ``linear.stored`` whose tensor ``store`` has, or None."""
    return next((place for place in linear.stored if place.tensor in store), None)


def piece(whole, stored: StoredWeight):
    """The part of a tensor, or of its shape, that ``stored`` means; a view, nothing is copied.

    Args:
        whole: the tensor named ``stored.tensor``, or its shape.
    """
    if isinstance(whole, torch.Tensor):
        if stored.index is not None:
            whole = whole[stored.index]
        return whole if stored.part is None else whole.chunk(2)[stored.part]
    shape = tuple(whole) if stored.index is None else tuple(whole)[1:]
    if stored.part is None or not shape:
        return shape
    return (shape[0] // 2, *shape[1:])
