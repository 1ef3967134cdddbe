"""Numbers that are not finite: whether there are any, and which token they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither a NaN nor an infinity."""
    # One reduction in the common case: a sum of finite fp32 values can overflow, so it only
    # clears; what it does not clear is looked at entry by entry.
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return bool(torch.isfinite(tensor.sum(dtype=dtype))) or bool(torch.isfinite(tensor).all())


class Origin(NamedTuple):
    """One token among those of an expert.

    Attributes:
        batch: number in the run.
        row: of the batch; None where tokens of all rows are mixed (routed modules).
        position: in the row, or among the tokens of the batch.
        largest: its largest |x|.
    """

    batch: int
    row: int | None
    position: int
    largest: float

    def told(self, expert: str, experts: Sequence[str], tokens: torch.Tensor | None = None) -> str:
        """In words.

        Args:
            experts: the expert of each batch.
            tokens: ``(B, S)`` ids of the batch, if that is what the model reads.
        """
        number = self.batch - list(experts).index(expert)
        if self.row is None:
            return f"token {self.position} of batch {number} of `{expert}`"
        name = f"token {self.position}"
        if tokens is not None and self.row < tokens.shape[0] and self.position < tokens.shape[1]:
            name += f" (id {int(tokens[self.row, self.position])})"
        return f"{name} of row {self.row} of batch {number} of `{expert}`"


class Peaks:
    """The largest |x| of every token, kept on its device and looked at only after trouble.

    Two readings of the activations and one number a token: next to the product of the activations
    with themselves, for which they are counted, that is next to nothing.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[int, torch.Size, torch.Tensor, torch.Tensor | None]]] = {}

    def add(self, expert: str, batch: int, X: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Look at a batch.

        Args:
            X: ``(B, S, d)`` or ``(n, d)``.
            keep: ``(B, S)`` bool, the tokens that count; None for all.
        """
        self._seen.setdefault(expert, []).append((batch, X.shape[:-1], peaks(X), keep))

    def first_bad(self, expert: str) -> Origin | None:
        """The first token of an expert that is not finite."""
        for batch, shape, found, keep in self._seen.get(expert, ()):
            bad = ~torch.isfinite(found).reshape(-1)
            keep = _fitting(keep, bad)
            if keep is not None:
                bad &= keep
            if bool(bad.any()):
                return _origin(batch, shape, found, keep, int(bad.nonzero()[0]))
        return None

    def largest(self, expert: str) -> Origin | None:
        """The token with the largest |x|."""
        origins = []
        for batch, shape, found, keep in self._seen.get(expert, ()):
            sizes = found.reshape(-1).float()
            keep = _fitting(keep, sizes)
            sizes = sizes if keep is None else sizes.masked_fill(~keep, -1)
            if len(sizes):
                origins.append(_origin(batch, shape, found, keep, int(sizes.argmax())))
        return max(origins, key=lambda origin: origin.largest, default=None)


def first_bad(batch: int, states: torch.Tensor, keep: torch.Tensor | None = None) -> Origin | None:
    """The first token of one batch ``(B, S, d)`` that is not finite."""
    seen = Peaks()
    seen.add("", batch, states, keep)
    return seen.first_bad("")


def peaks(X: torch.Tensor) -> torch.Tensor:
    """The largest |x| of every row, ``X.shape[:-1]``; NaN where one of them is NaN."""
    # On CPUs a tenth of the time of a norm, and without a copy of X.
    X = X.detach()
    return torch.maximum(X.amax(-1), X.amin(-1).neg_())


def _fitting(keep: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor | None:
    if not torch.is_tensor(keep) or keep.numel() != of.numel():
        return None
    return keep.to(of.device, torch.bool).reshape(-1)


def _origin(
    batch: int, shape: torch.Size, found: torch.Tensor, keep: torch.Tensor | None, index: int
) -> Origin:
    largest = float(found.reshape(-1)[index])
    if len(shape) == 2:
        return Origin(batch, *divmod(index, shape[1]), largest)
    return Origin(batch, None, index, largest)
