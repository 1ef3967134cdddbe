"""Any task of lm-eval, EleutherAI's language model evaluation harness, on a loaded model.

Its tasks, prompts, data and metrics are used as they are; ours is the loader alone, so a quantized
checkpoint and its full-precision merge are asked the same questions in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EPMQInputError
from .results import Evaluation, Measure

if TYPE_CHECKING:
    from .loading import Loaded

HARNESS = "lm-eval"


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to be asked.

    Attributes:
        names: as asked for, patterns resolved.
        manager: lm-eval's, which they came from.
        items: its tasks and groups at the top level.
    """

    names: tuple[str, ...]
    manager: Any
    items: tuple[Any, ...]


@dataclass(frozen=True)
class TaskOptions:
    """lm-eval's options of a run, under its own names and with its defaults.

    Attributes:
        limit: the first items of each task, or a share of them below 1; None for all.
        num_fewshot: shots; None for what each task says.
        batch_size: requests per forward pass; "auto" for what fits on a GPU.
        apply_chat_template: send prompts through the tokenizer's chat template.
        confirm_run_unsafe_code: tasks that run what the model wrote (HumanEval, MBPP).
        seed: of the shots and of everything else random.
    """

    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 1
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    seed: int = 1234


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        EPMQInputError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        raise EPMQInputError(
            f"`--tasks` needs lm-eval, which cannot be imported: {error}.",
            code="EPMQ-O03",
            subject="`--tasks`",
            remedy='Install it with `pip install "epmq-gptq[eval]"`.',
        ) from error


def prepare_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Find tasks by name or pattern, and read their data.

    Args:
        names: of tasks, groups or tags, ``*`` and ``?`` allowed.
        include_path: folder with YAML files of own tasks; they win over lm-eval's.

    Raises:
        EPMQInputError: lm-eval is missing, there is no such task, or its data cannot be had.
    """
    require_lm_eval()
    if include_path is not None and not Path(include_path).is_dir():
        raise EPMQInputError(
            f"`--include-path`: `{Path(include_path).name}` is not a folder.",
            code="EPMQ-O01",
            subject="`--include-path`",
            remedy="Give the folder with the YAML files of your tasks.",
        )
    manager, found = _find(names, include_path)
    try:
        loaded = manager.load(list(found))
    except Exception as error:  # of lm-eval, YAML, datasets, the hub
        raise EPMQInputError(
            f"`--tasks`: {', '.join(found)} cannot be prepared: {_reason(error)}.",
            code="EPMQ-F16" if isinstance(error, OSError) else "EPMQ-O04",
            subject="`--tasks`",
            remedy="lm-eval reads a task's data from the hub or its cache; look at the task's YAML "
            "and the connection.",
        ) from error
    groups = loaded["groups"]
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    items = [groups[name] for name in found if name in groups]
    items += [task for name, task in loaded["tasks"].items() if name not in inside]
    return Tasks(tuple(found), manager, tuple(items))


def _find(names: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        # lm-eval's own 14,000 take ten seconds to list.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in own.all_subtasks for name in names):
            return own, list(dict.fromkeys(names))
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise EPMQInputError(
                f"`--tasks`: lm-eval {version('lm_eval')} has no task `{name}`.",
                code="EPMQ-O02",
                subject="`--tasks`",
                remedy="`lm-eval ls tasks` lists them; own ones need `--include-path`.",
            )
        found += matches
    return manager, list(dict.fromkeys(found))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".: ")


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[str] | Tasks,
    options: TaskOptions | None = None,
    *,
    include_path: str | Path | None = None,
) -> Evaluation:
    """Ask ``loaded`` the questions of ``tasks``.

    Args:
        loaded: a language model, causal or encoder-decoder.
        tasks: names, or what :func:`prepare_tasks` made of them.
        options: lm-eval's; None for its defaults.
        include_path: see :func:`prepare_tasks`.

    Raises:
        EPMQInputError: see :func:`prepare_tasks`; or the model reads images.
    """
    options = options or TaskOptions()
    if loaded.form == "images":
        raise EPMQInputError(
            f"`--tasks`: lm-eval asks language models; `{loaded.name}` "
            f"({type(loaded.module).__name__}) reads images.",
            code="EPMQ-F38",
            subject="`--tasks`",
            remedy="Use `--suite vision8`, or the benchmark of the paper's tables.",
        )
    if not isinstance(tasks, Tasks):
        tasks = prepare_tasks(tasks, include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.module,
        backend="seq2seq" if loaded.form == "pairs" else "causal",
        tokenizer=loaded.tokenizer,
        batch_size=options.batch_size,
    )
    start = time.perf_counter()
    output = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks.items),
        task_manager=tasks.manager,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    seconds = time.perf_counter() - start
    return Evaluation(
        harness=HARNESS,
        model=loaded.described(),
        measures=_measures(output),
        settings={
            "lm_eval": version("lm_eval"),
            "tasks": list(tasks.names),
            "limit": options.limit,
            "num_fewshot": options.num_fewshot,
            "batch_size": options.batch_size,
            "apply_chat_template": options.apply_chat_template,
            "seed": options.seed,
        },
        seconds=seconds,
    )


def _measures(output: dict[str, Any]) -> list[Measure]:
    counts, subtasks = output.get("n-samples", {}), output.get("group_subtasks", {})
    measures = []
    for task, entries in output["results"].items():
        is_group = bool(subtasks.get(task))
        members = subtasks[task] if is_group else [task]
        items = sum(counts.get(member, {}).get("effective", 0) for member in members)
        better = output.get("higher_is_better", {}).get(task, {})
        for key, value in entries.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            details = {
                "filter": filtered,
                "num_fewshot": output.get("n-shot", {}).get(task),
                "version": output.get("versions", {}).get(task),
            }
            if is_group:
                details["group"] = list(members)
            measures.append(
                Measure(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=_number(value),
                    stderr=_number(entries.get(f"{metric}_stderr,{filtered}")),
                    items=items,
                    higher_is_better=better.get(metric),
                    details=details,
                )
            )
    return measures


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None  # lm-eval writes "N/A"
    return float(value) if math.isfinite(value) else None
