"""Figures with what is needed to trust them: task, metric, how many items, versions, hardware."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

_PACKAGES = ("torch", "transformers", "gptqmodel", "lm_eval", "safetensors", "numpy", "datasets")


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        task: of a suite, or of lm-eval.
        metric: its name; ``accuracy`` of a suite is in per cent, ``loss`` in nats, those of
            lm-eval as it gives them (mostly 0 to 1).
        value: None where the task could not be scored.
        stderr: standard error, None where it is not known.
        items: how many were scored.
        higher_is_better: None where it is not known.
        details: what the harness adds: shots, filter, version of the task.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    items: int
    higher_is_better: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """All figures of one model in one harness.

    Attributes:
        harness: "vision8", …, or "lm-eval".
        model: what :meth:`Loaded.described` says.
        measures: in the order in which they are shown.
        settings: options that decide the figures.
        seconds: of the evaluation, loading left out.
    """

    harness: str
    model: dict[str, Any]
    measures: list[Measure]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def averages(self) -> dict[str, float]:
        """Plain mean over the tasks of each metric that every task has; groups are none."""
        measures = [m for m in self.measures if "group" not in m.details]
        tasks = {m.task for m in measures}
        values: dict[str, list[float]] = {}
        for measure in measures:
            if measure.value is not None:
                values.setdefault(measure.metric, []).append(measure.value)
        return {
            metric: sum(found) / len(found)
            for metric, found in values.items()
            if len(found) == len(tasks) > 1
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without any absolute path."""
        return {
            "harness": self.harness,
            "model": self.model,
            "settings": self.settings,
            "measures": [asdict(measure) for measure in self.measures],
            "averages": self.averages(),
            "seconds": round(self.seconds, 3),
        }


def evaluation_document(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything about some evaluations, as plain data."""
    return environment() | {"evaluations": [each.to_dict() for each in evaluations]}


def environment() -> dict[str, Any]:
    """Versions and hardware, for every file of results."""
    import torch

    from .. import __version__

    versions = {"epmq_gptq": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):  # of systems other than Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table_of(evaluation: Evaluation) -> Table:
    """One line per figure, and the averages."""
    table = Table(title=f"{evaluation.model['name']}: {evaluation.harness}")
    table.add_column("task", overflow="fold")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± stderr", justify="right", no_wrap=True)
    table.add_column("items", justify="right", no_wrap=True)
    for measure in evaluation.measures:
        table.add_row(
            measure.task,
            measure.metric,
            _number(measure.value),
            _number(measure.stderr),
            f"{measure.items:,}",
        )
    averages = evaluation.averages()
    if averages:
        table.add_section()
        for metric, value in averages.items():
            table.add_row("average", metric, _number(value), "", "", style="bold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
