"""Datasets of the hub under one set of column names, the rows drawn from them, and what a family
of models makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from epmq_gptq.errors import EPMQInputError

from .specs import DatasetSpec

# Dataset → the commit that was read; None where the hub was not asked (offline).
COMMITS: dict[str, str | None] = {}


class Score(NamedTuple):
    """One figure of a table.

    Attributes:
        value: in per cent; of STS-B 100 · Spearman's rho.
        items: how many were scored.
    """

    value: float
    items: int


@dataclass
class Bench:
    """The tasks of one family of models; a family says what its rows are and how they are scored.

    Attributes:
        whole: folder of the base, with all that its inputs are read by.
        tasks: what is merged.
        batch_size: items per forward pass.
        limit: evaluated items per task, None for all.
        workers: processes that prepare images.
        seqlen: tokens of a calibration row at most, None for the model's own limit.
        runs_code: whether code that a model wrote may be run here.
    """

    whole: Path
    tasks: tuple[str, ...]
    device: str
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    seqlen: int | None = None
    runs_code: bool = False

    def spec(self, task: str) -> DatasetSpec:
        """The dataset of a task."""
        raise NotImplementedError

    def row(self, task: str, item: Mapping[str, Any]) -> dict[str, Any]:
        """A calibration row."""
        raise NotImplementedError

    def evaluate(self, model: torch.nn.Module, columns: Iterable[str]) -> dict[str, Score]:
        """Scores of a model that is on ``device``; ``columns`` are some of :attr:`columns`."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """What is scored."""
        return self.tasks

    @cached_property
    def tokenizer(self) -> Any:
        """The base's; all experts share it."""
        return AutoTokenizer.from_pretrained(self.whole)

    def datasets(self) -> dict[str, str | None]:
        """Dataset → commit."""
        specs = [self.spec(task) for task in self.tasks]
        return {spec.path: commit_of(spec) for spec in specs}

    def calibration(self, samples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
        """Task → rows of the training split."""
        rows = {}
        for task in self.tasks:
            data = load_split(self.spec(task), self.spec(task).train)
            picked = draw(len(data), samples, seed, task)
            rows[task] = [self.row(task, data[index]) for index in picked]
        return rows

    def scored_rows(self, task: str) -> Any:
        """The rows of the test split that are scored."""
        data = load_split(self.spec(task), self.spec(task).test)
        if self.limit is not None and self.limit < len(data):
            # Splits are often sorted by class: the first rows would be one class.
            data = data.select(sorted(draw(len(data), self.limit, 0, task)))
        return data


def commit_of(spec: DatasetSpec) -> str | None:
    """The commit that a dataset is at now; None without a connection."""
    if spec.path not in COMMITS:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        try:
            COMMITS[spec.path] = HfApi().dataset_info(spec.path).sha
        except OfflineModeIsEnabled:
            COMMITS[spec.path] = None
        except (OSError, HTTPError) as error:
            raise _refused(spec, error) from error
    return COMMITS[spec.path]


@cache
def _loaded(path: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(path, config, split=split, revision=revision)


def load_split(spec: DatasetSpec, split: str) -> Any:
    """One split with its columns renamed; a renamed column replaces one that has its new name.

    Raises:
        EPMQInputError: it cannot be had.
    """
    revision = commit_of(spec)
    try:
        data = _loaded(spec.path, spec.config, split, revision)
    except Exception as error:  # each of its file formats fails in a way of its own
        raise _refused(spec, error) from error
    for old, new in spec.columns.items():
        if old in data.column_names:
            if new in data.column_names:
                data = data.remove_columns(new)
            data = data.rename_column(old, new)
    return data


def _refused(spec: DatasetSpec, error: Exception) -> EPMQInputError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return EPMQInputError(
        f"dataset `{spec.path}` could not be loaded: {reason.rstrip('.')}.",
        code="EPMQ-F22",
        subject=f"dataset `{spec.path}`",
        remedy="Try again with a connection to the hub and access to that dataset.",
    )


def draw(length: int, samples: int, seed: int, task: str) -> list[int]:
    """Indices of ``samples`` rows, all different; a smaller draw is the beginning of a larger.

    The paper says neither how it drew nor whether its budgets of 64, 128 and 256 are nested; nested
    ones differ by their size alone.
    """
    order = list(range(length))
    random.Random(f"{seed} {task}").shuffle(order)
    return order[:samples]
