"""Rows of the same layers from several models, at a price that is known before they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..experts.linears import Linear, StoredWeight, resolve
from ..experts.weights import read_rows

MERGED, BASE = "the merged model", "`base`"
# Bytes of weights that a sample reads of each model.
SAMPLE_BYTES = 32_000_000
# Layers that a sample is spread over, and bytes of fp32 rows that are held per model at once.
SAMPLE_LAYERS = 256
BLOCK_BYTES = 4_000_000


def called(model: str) -> str:
    """How findings call a model."""
    return model if model in (MERGED, BASE) else f"expert `{model}`"


class ReadsRows(Protocol):
    """What is asked of :class:`~epmq_gptq.experts.experts.Experts` here."""

    names: list[str]

    def store(self, name: str) -> Any:
        """The weights of one expert; of an adapter, those of its base."""

    def adapter(self, name: str) -> Any:
        """What an adapter changes; None for a whole model."""

    def rows(self, name: str, module: str, start: int, stop: int) -> torch.Tensor:
        """Rows of ``W: (out, in)`` of one expert, ``(stop − start, in)`` fp32."""


class Rows(NamedTuple):
    """A range of rows of one layer's ``W: (out, in)``."""

    linear: Linear
    start: int
    stop: int


class Models:
    """The merged model, the experts and the base, where there is one, read the same way.

    Args:
        merged: tensors of the merged model.
        experts: bound to the layers.
        base: tensors of the base, or None.

    Attributes:
        names: of all models: experts first, then :data:`MERGED` and :data:`BASE`.
        bytes_read: fp16 rows count two bytes per entry, fp32 rows four, whatever is returned.
    """

    def __init__(self, merged: Any, experts: ReadsRows, base: Any | None = None):
        self.experts = experts
        self._stores = {MERGED: merged} | ({} if base is None else {BASE: base})
        self.names = [*experts.names, *self._stores]
        self.bytes_read = 0

    def rows(self, name: str, rows: Rows) -> torch.Tensor:
        """``(stop − start, in)`` fp32 of one model; nothing else of a plain tensor is read."""
        linear, start, stop = rows
        if name not in self._stores:
            self.bytes_read += self.price(rows)
            return self.experts.rows(name, linear.name, start, stop)
        self.bytes_read += self.price(rows)
        store = self._stores[name]
        return read_rows(store, resolve(linear, store), linear, start, stop)

    def is_same_source(self, one: str, other: str) -> bool:
        """Whether two models are one folder or one object, so that they are equal unread."""
        mine, theirs = self._source(one), self._source(other)
        return mine is not None and mine == theirs

    def _source(self, name: str) -> Any:
        if name in self._stores:
            store = self._stores[name]
        elif self.experts.adapter(name) is None:
            store = self.experts.store(name)
        else:
            return None
        return id(store) if store.path is None else store.path.resolve()

    def price(self, rows: Rows) -> int:
        """Bytes that are read for these rows of one model, by the merged model's dtype."""
        linear, start, stop = rows
        store = self._stores[MERGED]
        stored = resolve(linear, store)
        by_rows = _by_rows(linear, stored)
        return (stop - start if by_rows else linear.outputs) * self.row_bytes(linear)

    def row_bytes(self, linear: Linear) -> int:
        """Bytes of one row as the merged model stores it."""
        store = self._stores[MERGED]
        stored = resolve(linear, store)
        dtype = store.info(stored.tensor).torch_dtype or torch.float32
        return linear.inputs * dtype.itemsize

    # ---- which rows ----------------------------------------------------------------------------

    def everything(self, linears: Iterable[Linear]) -> Iterator[Rows]:
        """All rows of all layers, in blocks."""
        for linear in linears:
            yield from self._blocks(linear, 0, linear.outputs)

    def sample(self, linears: Sequence[Linear], budget: int = SAMPLE_BYTES) -> Iterator[Rows]:
        """The same rows on every machine: a stretch from the middle of layers of all depths.

        Args:
            linears: in forward order.
            budget: bytes that may be read of each model.
        """
        if sum(self.price(Rows(li, 0, li.outputs)) for li in linears) <= budget:
            yield from self.everything(linears)
            return
        count = min(SAMPLE_LAYERS, len(linears))
        chosen = [linears[(2 * index + 1) * len(linears) // (2 * count)] for index in range(count)]
        share = budget // count
        for linear in chosen:
            wanted = min(linear.outputs, max(1, share // self.row_bytes(linear)))
            start = (linear.outputs - wanted) // 2
            # What is stored transposed or as a piece is read whole, so there is no reason to take
            # less of it; the layers after it get what is left.
            if self.price(Rows(linear, start, start + wanted)) > share:
                start, wanted = 0, linear.outputs
            price = self.price(Rows(linear, start, start + wanted))
            if price > budget:
                continue
            budget -= price
            yield from self._blocks(linear, start, start + wanted)

    @staticmethod
    def _blocks(linear: Linear, start: int, stop: int) -> Iterator[Rows]:
        step = max(1, BLOCK_BYTES // (4 * linear.inputs))
        for first in range(start, stop, step):
            yield Rows(linear, first, min(first + step, stop))


def _by_rows(linear: Linear, stored: StoredWeight | None) -> bool:
    """Whether some rows of the layer can be read without the others."""
    plain = stored is not None and stored.index is None and stored.part is None
    return plain and not linear.transposed
