"""One base and an expert of it per task, fully fine-tuned: the loop that all suites share."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..evaluation.demo.hosting import one_thread
from .suite import Progress


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


def fit(
    model: torch.nn.Module,
    schedule: Schedule,
    loss_of: Callable[[torch.nn.Module, int], torch.Tensor],
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """AdamW with warm-up and cosine decay. ``loss_of(model, step)`` draws its own batch."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(0.9, 0.95),
    )
    warmup = max(1, schedule.steps // 20)
    model.train()
    for step in range(schedule.steps):
        decayed = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * min((step + 1) / warmup, 0.02 + 0.98 * decayed)
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress((step + 1) / schedule.steps)
    model.eval()


def train_family(
    base: torch.nn.Module,
    tasks: Sequence[str],
    schedules: tuple[Schedule, Schedule],
    loss_of: Callable[[str | None, Schedule], Callable[[torch.nn.Module, int], torch.Tensor]],
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
    with one_thread():
        for_base, for_expert = schedules
        told = lambda name: lambda done: progress(name, done)  # noqa: E731
        fit(base, for_base, loss_of(None, for_base), told("base"))
        save(base, "base")

        def expert(task: str) -> None:
            torch.set_num_threads(1)  # OpenMP counts its threads per calling thread
            model = copy.deepcopy(base)
            fit(model, for_expert, loss_of(task, for_expert), told(task))
            save(model, task)

        on_gpu = next(base.parameters()).is_cuda
        workers = 1 if on_gpu else min(len(tasks), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(expert, tasks))
