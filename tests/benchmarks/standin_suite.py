"""A suite of two tasks on a tiny Llama with the interface of ``epmq_gptq.suites``.

Nothing is trained: an expert is the base with noise, so the figures mean nothing, but every stage
of a table runs in a second or two. A task's score is next-token accuracy on its own random rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F

SUITES = ("standin", "broken")
TASKS = ("first", "second")
_SPLITS = {"calibration": 0, "held_out": 1, "evaluation": 2}


@dataclass(frozen=True)
class Score:
    accuracy: float
    loss: float
    items: int


@dataclass(frozen=True)
class Suite:
    name: str
    kind: str
    seed: int
    quick: bool
    folder: Path
    base: Path
    experts: dict[str, Path]
    tasks: tuple[str, ...] = TASKS

    def rows(self, task: str, split: str, count: int) -> list[dict]:
        seed = 1000 * self.seed + 10 * TASKS.index(task) + _SPLITS[split]
        return tiny.rows(count, 24, seed=seed)

    def calibration(self, samples: int, *, seed: int = 0) -> dict[str, list[dict]]:
        return {task: self.rows(task, "calibration", samples) for task in self.tasks}

    @torch.inference_mode()
    def evaluate(self, model, tasks=None, *, split="evaluation", batch_size=8):
        scores = {}
        for task in tasks or self.tasks:
            ids = torch.tensor([row["input_ids"] for row in self.rows(task, split, 8)])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            hits = logits.argmax(-1) == ids[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            accuracy = 100 * hits.float().mean().item()
            scores[task] = Score(accuracy, loss.item(), hits.numel())
        return scores


def build_suite(name, *, seed=0, quick=False, cache=None, device=None, progress=None) -> Suite:
    if name == "broken":
        raise RuntimeError("this suite cannot be built")
    folder = Path(cache) / f"{name}-{seed}"
    if not folder.is_dir():
        # As the suites do: made beside its place, so that another process never sees half of it.
        model = tiny.llama(1, 64, num_key_value_heads=4)
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        _, experts = tiny.family(part, len(TASKS), model=model, size=0.1 * (seed + 1))
        for task, path in zip(TASKS, experts.values(), strict=True):
            path.rename(part / task)
        tiny.save(tiny.llama(1, 64, num_key_value_heads=4), part / "base")
        part.rename(folder)
    return Suite(name, "text", seed, quick, folder, folder / "base", {t: folder / t for t in TASKS})
