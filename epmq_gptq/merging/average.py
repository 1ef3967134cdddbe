"""Simple average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .method import Block, MergeMethod, Stack, add_up


@dataclass(frozen=True)
class Average(MergeMethod):
    """Mean of the experts: theta = (1/K) sum_i theta_i (Wortsman et al. 2022, uniform soup)."""

    name: ClassVar[str] = "average"
    title: ClassVar[str] = (
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without "
        "increasing inference time"
    )
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    needs_base: ClassVar[bool] = False

    def merge(self, stack: Stack, state: Any = None) -> Tensor:
        """The mean of the experts' tensors."""
        return stack.map(_mean)


def _mean(block: Block) -> Tensor:
    # In fp64 the sum of K equal fp32 numbers is exact, so K equal experts give themselves back bit
    # for bit; in fp32 5x / 5 need not be x.
    return add_up([expert.to(torch.float64) for expert in block.experts]) / len(block.experts)
