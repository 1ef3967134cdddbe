"""A model on the tasks of a suite."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import EPMQInputError
from .results import Evaluation, Measure

if TYPE_CHECKING:
    from ..suites import Suite
    from .loading import Loaded


def check_suite_tasks(suite: Suite, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks of ``suite`` that were asked for; all of them for None.

    Raises:
        EPMQInputError: one that the suite does not have.
    """
    if not tasks:
        return tuple(suite.tasks)
    unknown = [task for task in tasks if task not in suite.tasks]
    if unknown:
        raise EPMQInputError(
            f"`--tasks`: `{suite.name}` has no task `{unknown[0]}`; it has "
            f"{', '.join(suite.tasks)}.",
            code="EPMQ-O02",
            subject="`--tasks`",
            remedy="Correct the name, or leave `--tasks` out for all of the suite.",
        )
    return tuple(dict.fromkeys(tasks))


def evaluate_suite(
    loaded: Loaded,
    suite: Suite,
    tasks: Sequence[str] | None = None,
    *,
    split: str = "evaluation",
    batch_size: int | None = None,
) -> Evaluation:
    """Accuracy in per cent and loss in nats of every task.

    Args:
        loaded: see :func:`~epmq_gptq.evaluation.load_model`.
        suite: see :func:`epmq_gptq.suites.build_suite`.
        tasks: some of its tasks; None for all.
        split: "evaluation", or "held_out", the rows that options are chosen with.
        batch_size: items per forward pass; None for the suite's own.

    Raises:
        EPMQInputError: a task that the suite lacks, or a model of another kind than the suite's.
    """
    chosen = check_suite_tasks(suite, tasks)
    if loaded.form != suite.kind:
        raise EPMQInputError(
            f"suite `{suite.name}` asks a model that reads {suite.kind}; `{loaded.name}` "
            f"({type(loaded.module).__name__}) reads {loaded.form}.",
            code="EPMQ-F38",
            subject="`--suite`",
            remedy="Evaluate a model that was made from this suite's experts.",
        )
    options = {} if batch_size is None else {"batch_size": batch_size}
    start = time.perf_counter()
    scores = suite.evaluate(loaded.module, chosen, split=split, **options)
    seconds = time.perf_counter() - start
    measures = []
    for task in chosen:
        score = scores[task]
        share = score.accuracy / 100
        stderr = 100 * math.sqrt(share * (1 - share) / score.items)
        measures.append(Measure(task, "accuracy", score.accuracy, stderr, score.items, True))
        measures.append(Measure(task, "loss", score.loss, None, score.items, False))
    return Evaluation(
        harness=suite.name,
        model=loaded.described(),
        measures=measures,
        settings={"split": split, "seed": suite.seed, "quick": suite.quick, **options},
        seconds=seconds,
    )
