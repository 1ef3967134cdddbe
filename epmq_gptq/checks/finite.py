"""NaN, infinite and large values in the weights that are read: all of them in ``"full"``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .findings import Finding
from .weights import MERGED, Rows, called

# float16 ends at 65,504; a weight near it overflows in the first product. Of the experts, F16 ones
# only: a larger range is what the other dtypes are for.
LARGE = 6e4
# Entries that are looked at at once.
_BLOCK = 1 << 24


@dataclass
class _Count:
    nan: int = 0
    inf: int = 0
    large: int = 0
    first: tuple[int, ...] | None = None

    def add(self, W: torch.Tensor, offset: int = 0) -> None:
        # NaN and infinities show in the extremes; only then every entry is looked at.
        low, high = W.aminmax()
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            self.large += int((W.abs() > LARGE).sum()) if max(-low, high) > LARGE else 0
            return
        nan, inf = torch.isnan(W), torch.isinf(W)
        self.nan += int(nan.sum())
        self.inf += int(inf.sum())
        self.large += int((W.abs() > LARGE).sum()) - int(inf.sum())
        if self.first is None:
            row, *rest = (nan | inf).nonzero()[0].tolist()
            self.first = (row + offset, *rest)


class Finite:
    """Counts per model and layer."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Count] = {}

    def add(self, model: str, rows: Rows, W: torch.Tensor) -> None:
        """Count one block of ``W: (out, in)``."""
        self._count(model, rows.linear.name).add(W, rows.start)

    def add_tensors(self, store: Any, skip: set[str]) -> int:
        """Count the merged model's other tensors (norms, biases, embeddings); returns bytes."""
        size = 0
        for name in store:
            info = store.info(name)
            if name in skip or info.torch_dtype is None or not info.shape or not info.numel:
                continue
            step = max(1, _BLOCK // max(1, info.numel // info.shape[0]))
            for start in range(0, info.shape[0], step):
                W = store.read_rows(name, start, min(start + step, info.shape[0]))
                size += W.numel() * W.element_size()
                self._count(MERGED, name).add(W.float(), start)
        return size

    def _count(self, model: str, name: str) -> _Count:
        return self._counts.setdefault((model, name), _Count())

    def to_dict(self) -> dict[str, Any]:
        """Model → what was counted, and the tensors where something is wrong."""
        table: dict[str, Any] = {}
        for (model, name), count in self._counts.items():
            entry = table.setdefault(
                model, {"tensors": 0, "nan": 0, "inf": 0, "large": 0, "where": {}}
            )
            entry["tensors"] += 1
            for kind in ("nan", "inf", "large"):
                entry[kind] += getattr(count, kind)
            if count.nan or count.inf:
                entry["where"][name] = {"nan": count.nan, "inf": count.inf, "first": count.first}
        return table

    def findings(self, level: str) -> Iterator[Finding]:
        """F08 and F09 for every tensor."""
        for (model, name), count in self._counts.items():
            bad = count.nan + count.inf
            if not bad:
                continue
            merged = model == MERGED
            yield Finding(
                level,
                "EPMQ-F09" if merged else "EPMQ-F08",
                called(model),
                f"{called(model)}: `{name}` holds {count.nan:,} NaN and "
                f"{count.inf:,} infinite values, the first at index {count.first}.",
                "Merge again, or quantize a merge that is finite."
                if merged
                else "Fetch the expert again, or leave it out.",
            )

    def large(self, half: set[str]) -> Iterator[Finding]:
        """A note on large values of the models in ``half``."""
        for model, entry in self.to_dict().items():
            if model in half and entry["large"]:
                yield Finding(
                    "note",
                    "EPMQ-F08",
                    called(model),
                    f"{called(model)}: {entry['large']:,} F16 weights are beyond ±{LARGE:g}, close "
                    "to the end of the range at 65,504.",
                    "Take the bfloat16 or float32 original where there is one.",
                )
