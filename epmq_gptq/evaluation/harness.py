"""Any task of lm-eval, EleutherAI's language model evaluation harness, on any model we can load.

lm-eval's tasks, prompts, data and metrics are used as they are. Only the loader is ours, so a
quantized checkpoint and its full-precision merge are asked the same questions in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EPMQInputError
from .results import Evaluation, Measure

if TYPE_CHECKING:
    from .loading import Loaded


@dataclass(frozen=True)
class TaskOptions:
    """lm-eval's options of a run, under its own names and with its defaults.

    Attributes:
        limit: the first items of each task, or a share of them below 1; None for all.
        num_fewshot: shots; None for what each task says.
        batch_size: requests per forward pass; "auto" for what fits on a GPU.
        apply_chat_template: send prompts through the tokenizer's chat template.
        confirm_run_unsafe_code: allow tasks that run what the model wrote (HumanEval, MBPP).
        seed: of the shots and of everything else random.

    Raises:
        EPMQInputError: `limit` or `batch_size` is not positive.
    """

    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 1
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit <= 0:
            raise _refused("--limit", f"should be positive, got {self.limit}", "Leave it out.")
        size = str(self.batch_size)
        if not size.startswith("auto") and not (size.isdigit() and int(size)):
            rule = f"should be a positive integer or `auto`, got `{size}`"
            raise _refused("--batch-size", rule, "Leave it out for 1.")
        # lm-eval counts items with an int, and takes a share of them with a float.
        if self.limit is not None and self.limit >= 1:
            object.__setattr__(self, "limit", int(self.limit))
        object.__setattr__(self, "batch_size", int(size) if size.isdigit() else size)


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval whose data has been read.

    Attributes:
        names: as asked for, patterns resolved.
        manager: lm-eval's `TaskManager`, which they came from.
        items: lm-eval's tasks and groups.
    """

    names: tuple[str, ...]
    manager: Any
    items: tuple[Any, ...]


def _refused(option: str, text: str, remedy: str, code: str = "EPMQ-O01") -> EPMQInputError:
    return EPMQInputError(f"`{option}` {text}.", code=code, subject=f"`{option}`", remedy=remedy)


def evaluate_model(
    model: str | Path,
    tasks: Sequence[str],
    options: TaskOptions | None = None,
    *,
    include_path: str | Path | None = None,
    kernel: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    say: Callable[[str, str], None] = lambda stage, text: None,
) -> Evaluation:
    """Load a model and evaluate it on tasks of lm-eval, whose data is read first.

    Args:
        model: folder or hub id: full precision, GPTQ or AWQ.
        tasks, include_path: see :func:`prepare_tasks`.
        options: lm-eval's; None for its defaults.
        kernel: compute with GPTQModel's kernel on a CPU as well.
        dtype, device: see :func:`~epmq_gptq.evaluation.load_model`.
        say: called with a stage and what it works on.

    Raises:
        EPMQInputError: there is no such task, or the model cannot be loaded.
    """
    from .loading import load_model

    prepared = prepare_tasks(tasks, include_path)
    say("tasks", ", ".join(prepared.names))
    loaded = load_model(model, device=device, dtype=dtype, dense=False if kernel else None)
    say("load", loaded.summary())
    return evaluate_tasks(loaded, prepared, options)


def prepare_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Find tasks by name or pattern, and read their data.

    Args:
        names: of tasks, groups or tags, ``*`` and ``?`` allowed.
        include_path: folder with YAML files of own tasks; they win over lm-eval's.

    Raises:
        EPMQInputError: lm-eval is missing, there is no such task, or its data cannot be had.
    """
    if not names:
        raise _refused(
            "--tasks",
            "should name what to evaluate on; there is nothing to evaluate on",
            "Give tasks of lm-eval, such as `--tasks hellaswag,gsm8k`.",
            "EPMQ-O03",
        )
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        text = f"needs lm-eval, which cannot be imported: {str(error).rstrip('.')}"
        remedy = 'Install it with `pip install "epmq-gptq[eval]"`.'
        raise _refused("--tasks", text, remedy, "EPMQ-O03") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise _refused(
            "--include-path",
            f"should be a folder; `{Path(include_path).name}` is not a folder",
            "Give the folder with the YAML files of your tasks.",
        )
    manager, found = _find(names, include_path)
    try:
        loaded = manager.load(list(found))
    except Exception as error:  # of lm-eval, YAML, datasets, the hub
        reason = next(iter(str(error).strip().splitlines()), "")
        raise _refused(
            "--tasks",
            f"{', '.join(found)} cannot be prepared: "
            + f"{type(error).__name__}: {reason}".rstrip(".: "),
            "lm-eval reads a task's data from the hub or its cache; look at the task's YAML and "
            "the connection.",
            "EPMQ-F16" if isinstance(error, OSError) else "EPMQ-O04",
        ) from error
    groups = loaded["groups"]
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    items = [groups[name] for name in found if name in groups]
    items += [task for name, task in loaded["tasks"].items() if name not in inside]
    return Tasks(tuple(found), manager, tuple(items))


def _find(names: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    from lm_eval.tasks import TaskManager

    own = None if include_path is None else str(include_path)
    if own is not None:
        # lm-eval's own 14,000 take ten seconds to list.
        manager = TaskManager(include_path=own, include_defaults=False)
        if all(name in manager.all_subtasks for name in names):
            return manager, list(dict.fromkeys(names))
    manager = TaskManager(include_path=own)
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise _refused(
                "--tasks",
                f"should name tasks of lm-eval {version('lm_eval')}, which has no task `{name}`",
                "`lm-eval ls tasks` lists them; own ones need `--include-path`.",
                "EPMQ-O02",
            )
        found += matches
    return manager, list(dict.fromkeys(found))


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[str] | Tasks,
    options: TaskOptions | None = None,
    *,
    include_path: str | Path | None = None,
) -> Evaluation:
    """Ask a loaded language model, causal or encoder-decoder, the questions of some tasks.

    Args:
        tasks: names, or what :func:`prepare_tasks` made of them.
        options: lm-eval's; None for its defaults.
        include_path: see :func:`prepare_tasks`.

    Raises:
        EPMQInputError: see :func:`prepare_tasks`; or the model reads images.
    """
    options = options or TaskOptions()
    if loaded.form == "images":
        raise _refused(
            "--tasks",
            f"are asked of language models; `{loaded.name}` ({type(loaded.module).__name__}) "
            "reads images",
            "Score its features with code of your own; `load_model` loads it.",
            "EPMQ-F38",
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
    settings = asdict(options)
    seed = settings.pop("seed")
    start = time.perf_counter()
    output = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks.items),
        task_manager=tasks.manager,
        log_samples=False,
        **settings,
        **dict.fromkeys(
            ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed
        ),
    )
    del settings["confirm_run_unsafe_code"]  # decides no figure
    return Evaluation(
        harness="lm-eval",
        model=loaded.facts(),
        measures=_measures(output),
        settings={"lm_eval": version("lm_eval"), "tasks": list(tasks.names)}
        | settings
        | {"seed": seed},
        seconds=time.perf_counter() - start,
    )


def _measures(output: dict[str, Any]) -> list[Measure]:
    counts, subtasks = output.get("n-samples", {}), output.get("group_subtasks", {})
    measures = []
    for task, entries in output["results"].items():
        members = subtasks.get(task)  # of a group
        items = sum(counts.get(name, {}).get("effective", 0) for name in members or [task])
        details = {
            "num_fewshot": output.get("n-shot", {}).get(task),
            "version": output.get("versions", {}).get(task),
        } | ({"group": list(members)} if members else {})
        for key, value in entries.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            measures.append(
                Measure(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=_number(value),
                    stderr=_number(entries.get(f"{metric}_stderr,{filtered}")),
                    items=items,
                    higher_is_better=output.get("higher_is_better", {}).get(task, {}).get(metric),
                    details={"filter": filtered} | details,
                )
            )
    return measures


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None  # lm-eval writes "N/A"
    return float(value) if math.isfinite(value) else None
