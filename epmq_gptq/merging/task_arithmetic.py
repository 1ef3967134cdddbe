"""Task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .method import MergeMethod, Stack, add_up, add_update, is_number, option


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Scaled sum of task vectors: theta = theta_0 + lam sum_i tau_i (Ilharco et al. 2023, sec. 4).

    The default scale is that of FusionBench.
    """

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Editing Models with Task Arithmetic"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2212.04089"

    lam: float = option(
        0.3, doc="scale of the sum of task vectors", rule="a finite number", check=is_number
    )

    def merge(self, stack: Stack, state: Any = None) -> Tensor:
        """theta_0 + lam sum_i tau_i."""
        return stack.map(
            lambda block: add_update(block.base, self.lam * add_up(block.task_vectors()))
        )
