"""The k-th smallest magnitude of a stream, exact, without holding the stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# |x| in fp32 is 31 bits (the sign is 0), and for finite numbers their order as integers is the
# order of the magnitudes, denormals included. They are told apart by the upper 16, then the lower
# 15: two histograms of half a megabyte instead of one of 2^31 bins.
_LOW = 15


class Selected(NamedTuple):
    """The k-th smallest magnitude, and how many magnitudes are larger."""

    value: float
    larger: int


class MagnitudeSelector:
    """Radix selection in two passes over the same numbers, in any order and any pieces.

    ``first`` on every piece, ``narrow(k)``, ``second`` on every piece, ``result()``. Equal to
    ``torch.cat(pieces).abs().kthvalue(k)``.
    """

    def __init__(self) -> None:
        self._upper = torch.zeros(1 << 16, dtype=torch.int64)
        self._lower = torch.zeros(1 << _LOW, dtype=torch.int64)
        self._bucket = 0
        self._rank = 0
        self._count = 0

    @property
    def count(self) -> int:
        """How many numbers ``first`` has seen."""
        return int(self._upper.sum())

    def first(self, numbers: Tensor) -> None:
        """Count ``numbers`` (fp32, finite) by their upper bits."""
        self._upper += _histogram(_bits(numbers) >> _LOW, len(self._upper))

    def narrow(self, rank: int) -> None:
        """Choose the bucket that holds the ``rank``-th smallest magnitude, from 1."""
        self._count = self.count
        assert 1 <= rank <= self._count
        self._bucket, self._rank = _find(self._upper, rank)

    def second(self, numbers: Tensor) -> None:
        """Count those of ``numbers`` that are in the chosen bucket by their lower bits."""
        bits = _bits(numbers)
        inside = bits[(bits >> _LOW) == self._bucket]
        self._lower += _histogram(inside & ((1 << _LOW) - 1), len(self._lower))

    def result(self) -> Selected:
        """The magnitude, and how many of all numbers are strictly larger."""
        low, _ = _find(self._lower, self._rank)
        bits = torch.tensor([(self._bucket << _LOW) | low], dtype=torch.int32)
        larger = int(self._upper[self._bucket + 1 :].sum() + self._lower[low + 1 :].sum())
        return Selected(bits.view(torch.float32).item(), larger)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.abs().reshape(-1).view(torch.int32)


def _histogram(keys: Tensor, bins: int) -> Tensor:
    return torch.bincount(keys, minlength=bins).cpu()


def _find(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the ``rank``-th smallest key, and its rank within that bin, both exact."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, rank))
    return index, rank - int(cumulative[index] - histogram[index])
