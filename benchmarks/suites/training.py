"""One base and an expert of it per task, fully fine-tuned: the loop that all suites share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from epmq_gptq.evaluation.demo.train import Progress, fit, in_parallel, one_thread


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns.

    Attributes:
        steps: of the optimiser.
        lr: at its peak, after a twentieth of the steps.
        batch_size: items per step.
    """

    steps: int
    lr: float
    batch_size: int


LossOf = Callable[[str | None, Schedule], Callable[[torch.nn.Module, int], torch.Tensor]]


def train_family(
    base: torch.nn.Module,
    tasks: Sequence[str],
    schedules: tuple[Schedule, Schedule],
    loss_of: LossOf,
    save: Callable[[torch.nn.Module, str], None],
    progress: Progress,
) -> None:
    """Train ``base`` on all tasks, then a copy of it on each.

    Every training has one thread, and on a CPU the experts run side by side: the result does not
    depend on how many cores there are.

    Args:
        base: freshly initialised, on its device.
        tasks: of the experts.
        schedules: of the base and of an expert.
        loss_of: (task, or None for all of them; schedule) → the loss of a step.
        save: writes a model under a name, "base" or a task.
        progress: called with (what is being trained, share done).
    """

    def trained(model: torch.nn.Module, name: str, task: str | None, schedule: Schedule) -> None:
        fit(
            model,
            loss_of(task, schedule),
            steps=schedule.steps,
            lr=schedule.lr,
            weight_decay=0.05,
            lowest=0.02,
            progress=lambda done: progress(name, done),
        )
        save(model, name)

    with one_thread():
        trained(base, "base", None, schedules[0])
        on_gpu = next(base.parameters()).is_cuda
        in_parallel(
            lambda task: trained(copy.deepcopy(base), task, task, schedules[1]),
            tasks,
            workers=1 if on_gpu else 0,
        )
