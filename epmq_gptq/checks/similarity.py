"""How far the experts are from the merge and the base, and which way: norms and cosines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from .findings import Finding
from .weights import BASE, MERGED

# ‖W_i − W_m‖/‖W_m‖. Fine-tunes of one base: 0.001 to 0.1; two models with nothing in common: √2.
UNRELATED = 0.9
# Cosine of two task vectors below which they undo each other. Independent ones are within ±0.05.
OPPOSITE = -0.2


class TaskVectors:
    """Sums over rows from which norms and cosines follow; any rows, in any order.

    With the models' rows as vectors w: all inner products of w_i − w_m, and of w_i − w_0 where a
    base is known. Within a block in fp32, over blocks in float64.

    Args:
        experts: their names.
        has_base: whether rows of the base will be given.
        total: entries of all layers, for the share that was read.
    """

    def __init__(self, experts: list[str], *, has_base: bool, total: int):
        self.experts = experts
        self.references = [MERGED, BASE] if has_base else [MERGED]
        self.total = total
        self.read = 0
        size = len(experts)
        self._products = {r: torch.zeros(size, size, dtype=torch.float64) for r in self.references}
        self._squares = dict.fromkeys(self.references, 0.0)

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """Count one block: model → the same rows of the same layer, ``(n, in)`` fp32."""
        self.read += rows[MERGED].numel()
        for reference in self.references:
            origin = rows[reference]
            taus = torch.stack([(rows[name] - origin).reshape(-1) for name in self.experts])
            self._products[reference] += (taus @ taus.T).double()
            self._squares[reference] += float(origin.square().sum())

    def to_dict(self) -> dict[str, Any]:
        """Ratios ‖W_i − W_ref‖/‖W_ref‖ and the cosine matrix, as plain data.

        Cosines are between the task vectors W_i − W_0 where the base is known. Otherwise W_m stands
        in for it: then they are lower (an average's experts point away from one another).
        """
        reference = self.references[-1]
        return {
            "share": self.read / self.total if self.total else 0.0,
            "to_merged": self._ratios(MERGED),
            "to_base": self._ratios(BASE) if BASE in self.references else None,
            "reference": "base" if reference == BASE else "merge",
            "cosine": self._cosines(reference),
        }

    def _ratios(self, reference: str) -> dict[str, float | None]:
        origin = math.sqrt(self._squares[reference])
        norms = self._products[reference].diagonal().clamp_min(0).sqrt().tolist()
        return {
            name: _finite(norm / origin if origin else math.inf)
            for name, norm in zip(self.experts, norms, strict=True)
        }

    def _cosines(self, reference: str) -> list[list[float | None]]:
        products = self._products[reference]
        norms = products.diagonal().clamp_min(0).sqrt()
        # A zero task vector has no direction: 0/0 gives NaN, which becomes None.
        cosines = products / torch.outer(norms, norms)
        return [[_finite(value) for value in row] for row in cosines.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def judge(table: dict[str, Any], experts: list[str]) -> Iterator[Finding]:
    """Experts that have nothing to do with the merge, and pairs that undo each other."""
    for name in experts:
        ratio = table["to_merged"][name]
        if ratio is not None and ratio > UNRELATED:
            yield Finding(
                "warning",
                "EPMQ-F19",
                f"expert `{name}`",
                f"expert `{name}` is far from the merged model: ‖W_i − W_m‖ is {ratio:.2f} of "
                "‖W_m‖ (fine-tunes of one base: below 0.1; unrelated models: 1.4).",
                "Make sure that the merge was made of it.",
            )
    if table["reference"] != "base":
        return
    for i, one in enumerate(experts):
        for j in range(i + 1, len(experts)):
            cosine = table["cosine"][i][j]
            if cosine is not None and cosine < OPPOSITE:
                yield Finding(
                    "note",
                    "EPMQ-F19",
                    f"experts `{one}` and `{experts[j]}`",
                    f"the task vectors of `{one}` and `{experts[j]}` have the cosine {cosine:.2f}: "
                    "they undo each other, and the merge has kept little of either.",
                    "Look at both in the report of the run.",
                )
