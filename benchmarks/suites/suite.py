"""What every suite offers: its models, its rows and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from epmq_gptq.errors import EPMQInputError

# No item is in two of them. `held_out` is for choosing options, `evaluation` for the tables.
SPLITS = ("train", "calibration", "held_out", "evaluation")


@dataclass(frozen=True)
class Score:
    """How well a model does a task.

    Attributes:
        accuracy: per cent of the items that are right.
        loss: nats per class, or per token.
        items: how many were asked.
    """

    accuracy: float
    loss: float
    items: int


@dataclass(frozen=True)
class Suite:
    """A base, its experts, and the rows of their tasks.

    Attributes:
        seed: of the data, the initial weights and the class embeddings.
        quick: whether it is the tiny version for tests.
        folder: of everything that was trained.
        base: folder of the model that all experts were fine-tuned from.
        experts: task → folder of its expert.
    """

    seed: int
    quick: bool
    folder: Path
    base: Path
    experts: dict[str, Path]

    name: ClassVar[str]
    kind: ClassVar[str]  # of its rows: "images", "text", "pairs"
    tasks: ClassVar[tuple[str, ...]]

    def calibration(self, samples: int, *, seed: int = 0) -> dict[str, list[Any]]:
        """Task → ``samples`` rows of the calibration split, as ``model.quantize`` takes them.

        Another ``seed`` gives other rows.
        """
        raise NotImplementedError

    def evaluate(
        self,
        model: torch.nn.Module,
        tasks: Sequence[str] | None = None,
        *,
        split: str = "evaluation",
        batch_size: int = 64,
    ) -> dict[str, Score]:
        """Task → score of a transformers model (of ``.model``, where GPTQModel loaded it).

        Args:
            model: on any device, in any floating dtype.
            tasks: some of the suite's; None for all.
            split: "evaluation", or "held_out".
            batch_size: items per forward pass.

        Raises:
            EPMQInputError: the suite has no such task or split.
        """
        if split not in SPLITS:
            raise _unknown("split", split, SPLITS)
        for task in tasks or ():
            if task not in self.tasks:
                raise _unknown("tasks", task, self.tasks)
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                return {
                    task: self._score(model, task, split, batch_size)
                    for task in (self.tasks if tasks is None else tasks)
                }
        finally:
            model.train(was_training)

    def _score(self, model: torch.nn.Module, task: str, split: str, batch_size: int) -> Score:
        raise NotImplementedError


def _unknown(option: str, got: str, known: Sequence[str]) -> EPMQInputError:
    return EPMQInputError(
        f"`{option}` should be of {', '.join(known)}, got {got!r}.",
        code="EPMQ-O01",
        subject=f"`{option}`",
        remedy=f"Leave `{option}` out for the default.",
    )


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    return next(model.parameters()).device


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """Of the model's activations: that of its first floating parameter (norms, embeddings)."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
