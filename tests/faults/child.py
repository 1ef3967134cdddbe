"""One attempt at a run, in a process that kills itself, or loses its GPU, where it is told to.

    python child.py SPEC.json

``kill`` of the specification names a phase, which call of it, and seconds after that call began: a
timer then sends SIGKILL to the process, wherever it is by then. ``lose`` names a phase and a call:
its GPU is then asked for what lies outside of a tensor. ``told`` is a file that then holds the
phase, and where the run came to its end how many attempts it took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from gptqmodel import CheckpointConfig
from gptqmodel.looper.checkpoint_store import CheckpointStore
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.models import writer

from epmq_gptq import EPMQConfig
from epmq_gptq.experts.passes.trajectories import ExpertTrajectories
from epmq_gptq.host import saving
from epmq_gptq.host.processor import EPMQProcessor
from epmq_gptq.host.resume import session
from epmq_gptq.host.solver import TargetSolver
from epmq_gptq.host.task import EPMQ
from epmq_gptq.method.statistics import GroupStatistics

# Phase → what begins it.
PHASES: dict[str, tuple[Any, str]] = {
    "forward": (EPMQProcessor, "_count"),
    "expert forward": (ExpertTrajectories, "_run_batch"),
    "fold": (GroupStatistics, "fold"),
    "solve": (TargetSolver, "solve"),
    "round": (EPMQ, "quantize"),
    "pack": (GPTQProcessor, "submodule_finalize"),
    "commit": (CheckpointStore, "commit"),
    "object": (CheckpointStore, "put_file"),
    "save": (writer, "streaming_state_dict_to_shards"),
    "verify": (saving, "verify_checkpoint"),
}


def kill(seconds: float) -> None:
    """Die so many seconds from now."""
    die = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    die.daemon = True
    die.start()


def lose() -> None:
    """A device-side assert: this process gets no further answer of its GPU."""
    torch.arange(3, device="cuda")[torch.tensor([9], device="cuda")]


def at(phase: str, call: int, step: Callable[[], None], told: Path) -> None:
    """Take a step as the ``call``-th call of a phase begins; ``told`` then says so."""
    owner, name = PHASES[phase]
    function: Callable = getattr(owner, name)
    calls = iter(range(1, sys.maxsize))

    def counted(*arguments, **options):
        if next(calls) == call:
            told.write_text(phase)
            step()
        return function(*arguments, **options)

    setattr(owner, name, counted)


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if spec.get("every_layer", True):
        session.SHARE = float("inf")
    told = Path(spec["told"])
    if spec.get("kill"):
        phase, call, seconds = spec["kill"]
        at(phase, call, lambda: kill(seconds), told)
    if spec.get("lose"):
        at(*spec["lose"], lose, told)
    config = EPMQConfig(group_size=32, experts=spec["experts"], **spec.get("options", {}))
    model = tiny.load(Path(spec["merged"]), config)
    checkpoint = CheckpointConfig(spec["root"]) if spec["root"] else None
    model.quantize(spec["rows"], batch_size=3, checkpoint=checkpoint)
    model.save(spec["out"], overwrite=True)
    told.write_text(str(model.epmq_report.attempts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
