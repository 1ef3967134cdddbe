"""Runs that are broken off at a layer and go on, for the tests: in one process, by an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gptqmodel import CheckpointConfig
from judge import stored

from epmq_gptq import EPMQConfig
from epmq_gptq.host.processor import EPMQProcessor
from epmq_gptq.host.resume import session


class Broken(Exception):
    """What ends a run in the middle."""


@contextlib.contextmanager
def broken_at(place: str) -> Iterator[None]:
    """Within: a run ends when the layers below a path, such as ``layers.1``, begin to count."""
    begin = EPMQProcessor.begin_shared_input_capture

    def count(self, model, subset_names, **options):
        first = next(iter(subset_names), None)
        task = self.tasks.get(first)
        if task is not None and f".{place}." in f".{task.full_name}.":
            raise Broken(task.full_name)
        return begin(self, model, subset_names, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EPMQProcessor, "begin_shared_input_capture", count)
        # Every layer, so that what is lost is known.
        patch.setattr(session, "SHARE", float("inf"))
        yield


class Run:
    """One job: the same inputs and options at each attempt."""

    def __init__(self, folder: Path, merged: Path, experts: dict[str, Any], rows, **options):
        self.folder, self.merged, self.experts, self.rows = folder, merged, experts, rows
        self.options = dict(group_size=32) | options
        self.root = folder / "checkpoint"

    def attempt(self, *, resume: str | None = "auto", batch_size: int = 3, **changes):
        """Load, and quantize with or without a checkpoint. Returns the host's model."""
        config = EPMQConfig(**self.options | {"experts": self.experts} | changes)
        model = tiny.load(self.merged, config)
        checkpoint = None if resume is None else CheckpointConfig(self.root, resume=resume)
        model.quantize(self.rows, batch_size=batch_size, checkpoint=checkpoint)
        return model

    def saved(self, model, name: str) -> dict[str, torch.Tensor]:
        """Save, and what was saved."""
        model.save(str(self.folder / name))
        return stored(self.folder / name)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two checkpoints of equal tensors."""
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


def goes_on(run: Run, *places: str) -> list:
    """Break it off at each place, go on, and compare. Returns the two models."""
    whole = run.attempt(resume=None)
    for place in places:
        with broken_at(place), pytest.raises(Broken):
            run.attempt()
    resumed = run.attempt(resume="required")
    assert resumed.epmq_report.attempts == len(places) + 1
    assert_same(run.saved(resumed, "resumed"), run.saved(whole, "whole"))
    return [whole, resumed]
