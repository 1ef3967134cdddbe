"""Rows of one expert that are in no sum yet: collected until a product of them is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.gram import ROWS


class Rows(NamedTuple):
    """Rows of one expert.

    Attributes:
        X: ``(n, d)`` inputs.
        ahead: ``(n, d)`` fp32 z − x, or None.
        gaps: member → ``(n, out)`` fp32 r_i − r.
    """

    X: torch.Tensor
    ahead: torch.Tensor | None
    gaps: dict[str, torch.Tensor]

    @property
    def kinds(self) -> tuple:
        """What else than X there is, and of what dtype X is: rows of one kind can be joined."""
        return self.X.dtype, self.ahead is None, tuple(self.gaps)

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in order."""
        ahead = [] if self.ahead is None else [self.ahead]
        return [self.X, *ahead, *self.gaps.values()]

    def of(self, tensors: Sequence[torch.Tensor]) -> Rows:
        """Rows of the same kind from :meth:`tensors`."""
        X, *others = tensors
        ahead = None if self.ahead is None else others.pop(0)
        return Rows(X, ahead, dict(zip(self.gaps, others, strict=True)))

    def moved(self, eta: float) -> torch.Tensor:
        """``(n, d)`` fp32 x + η (z − x)."""
        X = self.X.to(torch.float32)
        return X if self.ahead is None else torch.add(X, self.ahead, alpha=eta)


class Stage:
    """Room for :data:`~epmq_gptq.kernels.gram.ROWS` rows, so that products are of many rows.

    Batches of one sequence would read and write all sums for every few hundred rows.
    """

    def __init__(self, like: Rows):
        self.kinds = like.kinds
        self._room = [tensor.new_empty((ROWS, tensor.shape[1])) for tensor in like.tensors()]
        self._like = like.of([tensor[:0] for tensor in like.tensors()])
        self.count = 0

    def fits(self, rows: Rows) -> bool:
        """Whether they can be added."""
        return rows.kinds == self.kinds and self.count + len(rows.X) <= ROWS

    def add(self, rows: Rows) -> None:
        """Copy them: whoever gave them may write to them again."""
        stop = self.count + len(rows.X)
        for room, tensor in zip(self._room, rows.tensors(), strict=True):
            room[self.count : stop].copy_(tensor)
        self.count = stop

    def take(self) -> Rows:
        """What is there; the room is empty then, and may be written to once that was used."""
        rows = self._like.of([room[: self.count] for room in self._room])
        self.count = 0
        return rows
