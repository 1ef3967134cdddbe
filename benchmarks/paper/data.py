"""Datasets of the hub under one set of column names, and the rows drawn from them."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

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
