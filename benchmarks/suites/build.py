"""A suite by its name, trained now or taken from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.evaluation.demo.train import (
    Progress,
    cache_folder,
    folder_name,
    made_once,
    plan_of,
    train_all,
)

from . import pairs, text, vision
from .suite import Suite

# Name → the suite, its plan by (seed, quick), and what trains it: (plan, folder, device, progress).
_KNOWN: dict[str, tuple[type[Suite], Callable[[int, bool], Any], Callable[..., Any]]] = {
    "vision8": (
        vision.Vision8,
        lambda seed, quick: vision.VisionPlan(seed=seed, **(vision.QUICK if quick else {})),
        vision.train,
    ),
    # The demo's models, trained on the CPU as the demo does.
    "text4": (
        text.Text4,
        plan_of,
        lambda plan, out, device, progress: train_all(plan, out, progress),
    ),
    "seq2seq4": (
        pairs.Seq2Seq4,
        lambda seed, quick: pairs.PairsPlan(seed=seed, **(pairs.QUICK if quick else {})),
        pairs.train,
    ),
}
SUITES = tuple(_KNOWN)


def build_suite(
    name: str,
    *,
    seed: int = 0,
    quick: bool = False,
    cache: Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress = lambda name, done: None,
) -> Suite:
    """The suite ``name``: its models are trained if they are not in the cache.

    Args:
        name: one of :data:`SUITES`.
        seed: of data, initial weights and class embeddings. The same seed gives the same models on
            the same machine; on another one training rounds differently.
        quick: a tiny version, for tests.
        cache: folder; default ``$EPMQ_GPTQ_CACHE``, else ``~/.cache/epmq_gptq``.
        device: where to train; default a GPU where there is one.
        progress: called with (what is being trained, share done).

    Raises:
        EPMQInputError: there is no such suite, or scikit-learn is missing.
    """
    if name not in _KNOWN:
        raise EPMQInputError(
            f"`suite` should be one of {', '.join(SUITES)}, got {name!r}.",
            code="EPMQ-O01",
            subject="`suite`",
            remedy="Use one of these names.",
        )
    suite, plan_for, train = _KNOWN[name]
    plan = plan_for(seed, quick)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    cache = Path(cache or cache_folder()).expanduser().absolute()
    folder = cache / "suites" / folder_name(name, plan, device.type)
    made_once(folder, lambda out: train(plan, out, device, progress))
    return suite(
        seed=seed,
        quick=quick,
        folder=folder,
        base=folder / "base",
        experts={task: folder / task for task in suite.tasks},
    )
