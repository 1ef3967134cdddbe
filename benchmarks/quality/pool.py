"""Worker processes with one thread each; one that dies costs the cell it was at, not the run.

GPTQ's column loop is up to ten times slower with two OpenMP threads than with one, so two workers
of one thread are what two cores do best.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: str | None = None


class Pool:
    """At most ``size`` processes; jobs are (name, function, arguments), all picklable.

    Args:
        size: how many processes.
        log: folder for what they print.
    """

    def __init__(self, size: int, log: Path):
        self._context = multiprocessing.get_context("spawn")
        self._log, self.size, self._count = log, size, 0
        self._workers: list[_Worker] = []
        log.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.pipe.close()  # an idle worker ends by itself, and cleans up
        for worker in self._workers:
            worker.process.join(10 if worker.job is None else 0)
            worker.process.terminate()
            worker.process.join(10)

    @property
    def jobs(self) -> list[str]:
        """The names of what runs."""
        return [worker.job for worker in self._workers if worker.job is not None]

    @property
    def busy(self) -> int:
        """How many jobs run."""
        return len(self.jobs)

    @property
    def has_room(self) -> bool:
        """Whether another job can start."""
        return self.busy < self.size

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a job; there must be room."""
        idle = next((worker for worker in self._workers if worker.job is None), None)
        if idle is None:
            assert len(self._workers) < self.size
            idle = self._start()
        idle.job = name
        idle.pipe.send((function, arguments))

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        self._count += 1
        log = self._log / f"worker{self._count}.log"
        process = self._context.Process(target=_work, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def next(self) -> tuple[str, Any]:
        """Wait for a job to end; its name, and its result or ``{"error": {...}}``."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        worker = busy[wait(list(busy))[0]]
        name, worker.job = worker.job, None
        try:
            return name, worker.pipe.recv()
        except EOFError:
            worker.process.join(10)
            self._workers.remove(worker)
            code = worker.process.exitcode
            return name, {
                "error": {"type": "WorkerDied", "message": f"the process ended with code {code}"}
            }


def _work(pipe: Connection, log: str) -> None:
    stream = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    # The host writes to the descriptors, too, and must not tear the parent's lines.
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:
            traceback.print_exc()
            result = {"error": {"type": type(error).__name__, "message": str(error)}}
            code = getattr(error, "code", None)
            if isinstance(code, str):
                result["error"]["code"] = code
        pipe.send(result)
