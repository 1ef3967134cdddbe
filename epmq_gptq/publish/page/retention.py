"""What is kept of every expert: evaluations of several models put side by side.

The figures come from ``epmq-gptq evaluate --json``; an expert is judged on its own task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field

from ...errors import EPMQInputError
from ...io.declared import Declared, ruled, validated
from ...io.folders import list_folder, read_json
from ...io.output import write_whole

FILE_NAME = "epmq_evaluation.json"
SCHEMA = 1
# The models of a merge's life, in order; `expert` and `quantized` are always known.
STAGES = ("base", "expert", "merged", "gptq", "quantized")

_MAX_BYTES = 100_000_000
# Settings that decide the speed of an evaluation, not its figures; which tasks were asked together
# does not matter either.
_FREE_SETTINGS = ("batch_size", "tasks")
_AGAIN = "Write it anew with `epmq-gptq retention`."


class ExpertRetention(Declared):
    """One expert's own task, under each model.

    Attributes:
        task, metric: what was measured, as the evaluation calls it.
        higher_is_better: False for a loss.
        expert, quantized: the figure of the expert itself, and of the quantized merge.
        base, merged, gptq: of the others, None where they were not evaluated.
    """

    task: str
    metric: str
    higher_is_better: bool
    expert: float
    quantized: float
    base: float | None = None
    merged: float | None = None
    gptq: float | None = None

    def percent(self, stage: str = "quantized") -> float | None:
        """How much of the expert's figure a model has, in per cent.

        Args:
            stage: one of :data:`STAGES`.

        Returns:
            model / expert, or expert / model where lower is better; None where the model was not
            evaluated, or where a figure is not above zero, so that their ratio says nothing.
        """
        value = getattr(self, stage)
        if value is None:
            return None
        over, under = (value, self.expert) if self.higher_is_better else (self.expert, value)
        return 100 * over / under if under > 0 and over >= 0 else None


class Retention(Declared):
    """What is kept of each expert.

    Attributes:
        experts: name → its figures.
    """

    experts: dict[str, ExpertRetention]

    def average(self, stage: str = "quantized") -> float | None:
        """The plain mean over the experts, None where one has no percentage."""
        found = [expert.percent(stage) for expert in self.experts.values()]
        return None if not found or None in found else sum(found) / len(found)

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "schema": SCHEMA,
            "experts": {name: one.model_dump() for name, one in self.experts.items()},
        }


class _RetentionFile(Retention):
    """The content of :data:`FILE_NAME`."""

    file_schema: Annotated[int, ruled(str(SCHEMA), lambda got: got == SCHEMA)] = Field(
        alias="schema"
    )


def read_retention(folder: str | Path, name: str = FILE_NAME) -> Retention | None:
    """The retention of a checkpoint.

    Args:
        folder: of the checkpoint.
        name: of the file in it.

    Returns:
        None where there is no such file.

    Raises:
        EPMQInputError: the file is not as :func:`write_retention` makes it, or there is no folder.
    """
    folder = Path(folder)
    if name not in list_folder(folder, f"`{folder.name}`"):
        return None
    content = read_json(folder, name, "the evaluation", max_bytes=_MAX_BYTES)
    read = validated(_RetentionFile, content, f"`{name}`", code="EPMQ-F53", remedy=_AGAIN)
    return Retention(experts=read.experts)


def write_retention(folder: str | Path, retention: Retention) -> Path:
    """Write :data:`FILE_NAME` into a checkpoint's folder, whole or not at all; returns its path."""
    file = Path(folder) / FILE_NAME
    text = json.dumps(retention.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(file, text + "\n")
    return file


# ---- combining evaluations ----------------------------------------------------------------------


def retention_of(
    folder: Path,
    *,
    quantized: Path,
    experts: Mapping[str, Path],
    others: Mapping[str, Path] | None = None,
    tasks: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> tuple[Retention, list[str]]:
    """Put files of ``epmq-gptq evaluate --json`` side by side; nothing is written.

    Args:
        folder: the quantized checkpoint.
        quantized: file about it.
        experts: name → file about that expert.
        others: ``"base"``, ``"merged"``, ``"gptq"`` → file about that model.
        tasks, metrics: see :func:`combine`.

    Returns:
        What is kept, and the names of the checkpoint's experts without a file.

    Raises:
        EPMQInputError: a file or the folder is not what it should be, the folder has no such
            expert, or see :func:`combine`.
    """
    known = _experts_of(folder)
    for name in experts:
        if name not in known:
            raise EPMQInputError(
                f"`--expert`: `{folder.name}` has no expert `{name}`; it has {', '.join(known)}.",
                code="EPMQ-F54",
                subject="`--expert`",
                remedy="Name the experts as in the run.",
            )
    found = combine(
        {name: EvaluationFile(file, f"--expert {name}") for name, file in experts.items()},
        EvaluationFile(quantized, "--quantized", quantized=True),
        {
            stage: EvaluationFile(file, f"--{stage}", quantized=stage == "gptq")
            for stage, file in (others or {}).items()
        },
        tasks=tasks,
        metrics=metrics,
    )
    return found, [name for name in known if name not in experts]


def _experts_of(folder: Path) -> list[str]:
    """The experts that a checkpoint of ours was made from."""
    record = read_json(folder, "quantize_config.json", f"`{folder.name}`")
    meta = record.get("meta")
    meta = meta.get("epmq") if isinstance(meta, dict) else None
    experts = meta.get("experts") if isinstance(meta, dict) else None
    if not isinstance(experts, list):
        raise EPMQInputError(
            f"`{folder.name}` does not say which experts it was made from, so it is not a "
            "checkpoint of epmq_gptq.",
            code="EPMQ-F53",
            subject="`DIR`",
            remedy="Give the folder that `epmq-gptq quantize` wrote.",
        )
    return [str(one["name"]) for one in experts if isinstance(one, dict) and "name" in one]


class _Part(Declared):
    """Of a file of ``evaluate`` we read what is compared; it holds more."""

    model_config = ConfigDict(extra="ignore")


class _Model(_Part):
    name: str = ""
    quantization: Any = None


class _Measure(_Part):
    task: str
    metric: str
    value: float | None = None
    items: Annotated[int, Field(ge=0)]
    higher_is_better: bool | None = None


class _Evaluation(_Part):
    model: _Model
    harness: str
    settings: dict[str, Any] = {}
    measures: list[_Measure]


class _Evaluations(_Part):
    evaluations: list[_Evaluation]


class _Figure(NamedTuple):
    """One figure of one evaluation, with what must agree between models."""

    value: float | None
    items: int
    higher_is_better: bool | None
    harness: str
    settings: dict[str, Any]


class EvaluationFile:
    """What ``epmq-gptq evaluate --json`` wrote about one model.

    Args:
        file: its path.
        what: how errors call it: the option.
        quantized: whether its model should be a quantized one; None for either.

    Attributes:
        tasks: task → metric → the figure; groups of tasks included.

    Raises:
        EPMQInputError: it cannot be read, a task is there twice, or its model is of the wrong kind.
    """

    def __init__(self, file: Path, what: str, *, quantized: bool | None = None):
        self.what = what
        content = read_json(file.parent, file.name, f"`{what}`", max_bytes=_MAX_BYTES)
        read = validated(
            _Evaluations,
            content,
            f"`{file.name}`",
            code="EPMQ-F53",
            remedy="Write it with `epmq-gptq evaluate MODEL --json FILE`.",
        )
        self.tasks: dict[str, dict[str, _Figure]] = {}
        for one in read.evaluations:
            if quantized is not None and (one.model.quantization is not None) != quantized:
                kinds = ("a full-precision", "a quantized")
                found, wanted = kinds if quantized else kinds[::-1]
                raise self._refusal(
                    f"`{file.name}` is the evaluation of {found} model, `{one.model.name}`, and "
                    f"should be of {wanted} one",
                    "Give the file of the right model.",
                )
            self._add(one)

    def _add(self, one: _Evaluation) -> None:
        settings = {key: value for key, value in one.settings.items() if key not in _FREE_SETTINGS}
        for each in one.measures:
            metrics = self.tasks.setdefault(each.task, {})
            if each.metric in metrics:
                raise self._refusal(
                    f"task `{each.task}` is in its file twice with `{each.metric}`",
                    "Evaluate the suites into files of their own.",
                )
            metrics[each.metric] = _Figure(
                each.value, each.items, each.higher_is_better, one.harness, settings
            )

    def _refusal(self, cause: str, remedy: str) -> EPMQInputError:
        return EPMQInputError(
            f"`{self.what}`: {cause}.", code="EPMQ-F54", subject=f"`{self.what}`", remedy=remedy
        )


def combine(
    experts: Mapping[str, EvaluationFile],
    quantized: EvaluationFile,
    others: Mapping[str, EvaluationFile] | None = None,
    *,
    tasks: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> Retention:
    """Each expert beside the models that are to replace it, on its own task.

    Args:
        experts: name → evaluation of that expert.
        quantized: of the quantized merge.
        others: ``"base"``, ``"merged"``, ``"gptq"`` → evaluation of that model.
        tasks: name → its task; else the task of the expert's name, or the only one that it and the
            quantized model have in common.
        metrics: name → metric; else accuracy of a suite, or the only one.

    Raises:
        EPMQInputError: a task or metric is missing or not clear, has no figure, or was measured
            otherwise (other items, another seed or number of shots) for one of the models.
    """
    for option, given in (("--task", tasks or {}), ("--metric", metrics or {})):
        for name in given:
            if name not in experts:
                raise _mixed(option, f"there is no expert `{name}` among the given ones")
    found = {}
    for name, own in experts.items():
        task = (tasks or {}).get(name) or _task_of(name, own, quantized)
        models = {"expert": own, "quantized": quantized, **(others or {})}
        metric = (metrics or {}).get(name) or _metric_of(name, task, own)
        reference = _figure(own, task, metric)
        if reference.higher_is_better is None:
            raise _mixed(own.what, f"`{metric}` of `{task}` does not say whether more is better")
        values = {}
        for stage, model in models.items():
            figure = _figure(model, task, metric)
            _check_same(figure, reference, model.what, own.what, task)
            values[stage] = figure.value
        found[name] = ExpertRetention(
            task=task, metric=metric, higher_is_better=reference.higher_is_better, **values
        )
    return Retention(experts=found)


def _task_of(name: str, own: EvaluationFile, quantized: EvaluationFile) -> str:
    common = [task for task in own.tasks if task in quantized.tasks]
    if name in common:
        return name
    if len(common) == 1:
        return common[0]
    cause = f"it is not clear which task is that of `{name}`: its evaluation and that of the "
    cause += f"quantized model have {', '.join(common) or 'none'} in common"
    raise EPMQInputError(
        f"`--task`: {cause}.",
        code="EPMQ-O03",
        subject=f"expert `{name}`",
        remedy=f"Say it with `--task {name}=TASK`, or evaluate both models on the same tasks.",
    )


def _metric_of(name: str, task: str, own: EvaluationFile) -> str:
    metrics = own.tasks.get(task, {})
    # A suite tells accuracy and loss of the same answers.
    if "accuracy" in metrics:
        return "accuracy"
    if len(metrics) > 1:
        raise EPMQInputError(
            f"`--metric`: task `{task}` of expert `{name}` has several: {', '.join(metrics)}.",
            code="EPMQ-O03",
            subject=f"expert `{name}`",
            remedy=f"Choose one with `--metric {name}=METRIC`.",
        )
    return next(iter(metrics), "")


def _figure(model: EvaluationFile, task: str, metric: str) -> _Figure:
    figure = model.tasks.get(task, {}).get(metric)
    if figure is None or figure.value is None:
        what = f"`{task}` ({metric})" if metric else f"`{task}`"
        raise _mixed(model.what, f"its file has no figure for {what}")
    return figure


def _check_same(one: _Figure, other: _Figure, what: str, beside: str, task: str) -> None:
    keys = dict.fromkeys([*one.settings, *other.settings])
    odd = [key for key in keys if one.settings.get(key) != other.settings.get(key)]
    if one.harness != other.harness:
        odd = ["harness"]
    elif one.items != other.items:
        odd = ["items"]
    elif one.higher_is_better != other.higher_is_better:
        odd = ["higher_is_better"]
    if odd:
        raise _mixed(what, f"`{task}` was measured with another `{odd[0]}` than for `{beside}`")


def _mixed(option: str, what: str) -> EPMQInputError:
    return EPMQInputError(
        f"`{option}`: {what}.",
        code="EPMQ-F54",
        subject=f"`{option}`",
        remedy="Evaluate every model in the same way, and name experts as in the run.",
    )
