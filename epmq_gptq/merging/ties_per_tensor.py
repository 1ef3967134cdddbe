"""TIES with a trim within each tensor, as mergekit's `ties` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import EPMQInputError
from .method import Block, MergeMethod, Stack, add_up, add_update, is_number, option
from .selection import MagnitudeSelector, Selected


def _is_weights(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and all(isinstance(k, str) and is_number(v) for k, v in value.items())
    )


@dataclass(frozen=True)
class TiesPerTensor(MergeMethod):
    """TIES, trimmed per tensor and weighted as in mergekit (Yadav et al. 2023).

    Within one tensor of n entries, p an entry, w_i the weight of expert i:

    1. trim: expert i keeps its floor(density · n) largest |tau_ip|, at least one (mergekit stops
       there instead); among equal magnitudes the first by position stay;
    2. elect: v_ip = w_i tau_ip; g_p = +1 where sum_i v_ip >= 0, else -1;
    3. merge: m_p = sum of the v_ip of sign g_p, with ``normalize`` divided by the sum of their w_i
       (by 1 where that is 0);
    4. theta = theta_0 + lam m.
    """

    name: ClassVar[str] = "ties_per_tensor"
    title: ClassVar[str] = "TIES-Merging: Resolving Interference When Merging Models"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2306.01708"

    density: float = option(
        1.0,
        doc="fraction of each tensor's entries that the trim keeps",
        rule="a fraction above 0 and at most 1 (0.2 keeps the largest 20 %)",
        check=lambda value: is_number(value) and 0 < value <= 1,
    )
    weights: Mapping[str, float] | None = option(
        None,
        doc="expert name → weight of its task vector before the election; all 1 if left out",
        rule="a mapping from every expert's name to a finite number",
        check=_is_weights,
    )
    normalize: bool = option(
        True,
        doc="divide by the sum of the weights that survive the election",
        rule="true or false",
        check=lambda value: isinstance(value, bool),
    )
    lam: float = option(
        1.0, doc="scale of the merged task vector", rule="a finite number", check=is_number
    )

    def check_experts(self, names: Sequence[str]) -> None:
        """Every expert has a weight and every weight an expert."""
        if self.weights is not None and set(self.weights) != set(names):
            raise EPMQInputError(
                f"`weights` should name exactly the experts {sorted(names)}, got "
                f"{sorted(self.weights)}.",
                code="EPMQ-O01",
                subject="`weights`",
                remedy="Give each expert one weight, or leave `weights` out for weights of 1.",
            )

    def merge(self, stack: Stack, state: Any = None) -> Tensor:
        """theta_0 + lam m, see the class. Trims within ``stack``: two passes in memory."""
        size = stack.shape.numel()
        keep = max(1, int(self.density * size))
        weights = [1.0 if self.weights is None else self.weights[name] for name in stack.experts]
        if keep >= size:
            return stack.map(lambda block: self._elected(block.base, block.task_vectors(), weights))
        cuts = _select(stack, size - keep + 1)
        quota = [keep - cut.larger for cut in cuts]

        def formula(block: Block) -> Tensor:
            # `quota` runs down over the blocks, which `map` visits in order of position.
            taus = block.task_vectors()
            for i, cut in enumerate(cuts):
                mask, quota[i] = _keep(taus[i].abs(), cut.value, quota[i])
                taus[i] = torch.where(mask, taus[i], torch.zeros_like(taus[i]))
            return self._elected(block.base, taus, weights)

        return stack.map(formula)

    def _elected(self, base: Tensor, taus: list[Tensor], weights: list[float]) -> Tensor:
        taus = [weight * tau for weight, tau in zip(weights, taus, strict=True)]
        sign = torch.where(add_up(taus) >= 0, 1.0, -1.0)
        masks = [(tau.sign() == sign).to(tau.dtype) for tau in taus]
        merged = add_up([tau * mask for tau, mask in zip(taus, masks, strict=True)])
        if self.normalize:
            total = add_up([weight * mask for weight, mask in zip(weights, masks, strict=True)])
            total[total == 0] = 1
            merged /= total
        return add_update(base, self.lam * merged)


def _select(stack: Stack, rank: int) -> list[Selected]:
    selectors = [MagnitudeSelector() for _ in stack.experts]
    for block in stack.blocks():
        for selector, tau in zip(selectors, block.task_vectors(), strict=True):
            selector.first(tau)
    for selector in selectors:
        selector.narrow(rank)
    for block in stack.blocks():
        for selector, tau in zip(selectors, block.task_vectors(), strict=True):
            selector.second(tau)
    return [selector.result() for selector in selectors]


def _keep(magnitude: Tensor, cut: float, quota: int) -> tuple[Tensor, int]:
    """All above ``cut``, and of those equal to it the first ``quota``; and the quota left."""
    equal = magnitude == cut
    count = int(equal.sum())
    if count > quota:
        order = equal.reshape(-1).cumsum(0).reshape(equal.shape)
        equal &= order <= quota
    return (magnitude > cut) | equal, max(0, quota - count)
