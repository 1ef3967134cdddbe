"""TIES with a trim over the whole model, as FusionBench computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .method import Block, MergeMethod, Stack, add_up, add_update, is_number, option
from .selection import MagnitudeSelector

MERGE_FUNCTIONS = ("sum", "mean", "max")


class WholeModel(NamedTuple):
    """What TIES must know of all tensors before it can merge one."""

    thresholds: list[float]  # smallest magnitude that each of the K experts keeps
    majority: int  # sign that settles a sum of zero: -1, 0 or 1


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES, trimmed over the whole model as in FusionBench (Yadav et al. 2023, algorithm 1).

    With d the number of floating entries of a model and p an entry:

    1. trim: expert i keeps tau_ip where |tau_ip| is at least its (d - floor(threshold/100 · d))-th
       smallest magnitude over the *whole* model, ties included; the rest is 0;
    2. elect: g_p = sign(sum_i tau_ip); where that sum is 0, g_p = sign(sum_p g_p), also over the
       whole model;
    3. merge: m_p = sum, mean or max-magnitude (times g_p) of the trimmed tau_ip of sign g_p; a g_p
       that is still 0 selects the negative ones for sum and mean, as the source suite does;
    4. theta = theta_0 + lam m.

    Two conventions: only floating tensors count in d, and a tensor that is stored once (a tied
    embedding) counts once, whereas a state dict in memory lists it under both names.

    Costs four passes over the K + 1 models: two to select the thresholds exactly, one to count the
    elected signs, one to merge. State between tensors is K histograms, under 1 MB each.
    """

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES-Merging: Resolving Interference When Merging Models"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    passes: ClassVar[int] = 4

    threshold: float = option(
        20.0,
        doc="percentage of each expert's entries that the trim keeps, over the whole model",
        # FusionBench reads values up to 1 as fractions; refusing them keeps one meaning.
        rule="a percentage above 1 and at most 100 (20 keeps the largest 20 %)",
        check=lambda value: is_number(value) and 1 < value <= 100,
    )
    merge_func: str = option(
        "sum",
        doc="how the entries that agree with the elected sign are combined",
        rule=f"one of {', '.join(MERGE_FUNCTIONS)}",
        check=lambda value: value in MERGE_FUNCTIONS,
    )
    lam: float = option(
        0.3, doc="scale of the merged task vector", rule="a finite number", check=is_number
    )

    def prepare(self, each: Callable[[Callable[[Stack], None]], None]) -> WholeModel:
        """The experts' thresholds and the majority sign, in three passes."""
        selectors: list[MagnitudeSelector] = []

        def count_upper_bits(stack: Stack) -> None:
            selectors.extend(
                MagnitudeSelector() for _ in range(len(stack.experts) - len(selectors))
            )
            for block in stack.blocks():
                for selector, tau in zip(selectors, block.task_vectors(), strict=True):
                    selector.first(tau)

        def count_lower_bits(stack: Stack) -> None:
            for block in stack.blocks():
                for selector, tau in zip(selectors, block.task_vectors(), strict=True):
                    selector.second(tau)

        each(count_upper_bits)
        for selector in selectors:
            selector.narrow(self._rank(selector.count))
        each(count_lower_bits)
        thresholds = [selector.result().value for selector in selectors]

        balance = 0

        def count_signs(stack: Stack) -> None:
            nonlocal balance
            for block in stack.blocks():
                # Entries beyond 2^24 would be lost in an fp32 sum of signs.
                balance += int(_elect(_trim(block, thresholds)).sum(dtype=torch.int64))

        each(count_signs)
        return WholeModel(thresholds, (balance > 0) - (balance < 0))

    def _rank(self, entries: int) -> int:
        # floor of the float product, in this order, is what the source suite computes. At 100 %
        # it asks for the 0-th smallest and fails; the smallest keeps everything, as meant.
        return max(1, entries - int(entries * (self.threshold / 100)))

    def merge(self, stack: Stack, state: Any) -> Tensor:
        """theta_0 + lam m, see the class."""
        return stack.map(
            lambda block: add_update(block.base, self.lam * self._disjoint(block, state))
        )

    def _disjoint(self, block: Block, state: WholeModel) -> Tensor:
        taus = _trim(block, state.thresholds)
        sign = _elect(taus)
        sign[sign == 0] = state.majority
        zero = torch.zeros_like(sign)
        kept = [torch.where(torch.where(sign > 0, tau > 0, tau < 0), tau, zero) for tau in taus]
        if self.merge_func == "max":
            return torch.stack([tau.abs() for tau in kept]).amax(dim=0) * sign
        total = add_up(kept)
        if self.merge_func == "mean":
            total /= add_up([(tau != 0).to(total.dtype) for tau in kept]).clamp_(min=1)
        return total


def _trim(block: Block, thresholds: list[float]) -> list[Tensor]:
    taus = block.task_vectors()
    return [
        torch.where(tau.abs() >= threshold, tau, torch.zeros_like(tau))
        for tau, threshold in zip(taus, thresholds, strict=True)
    ]


def _elect(taus: list[Tensor]) -> Tensor:
    return add_up(taus).sign_()
