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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any


class Pool:
    """At most ``size`` processes; jobs are (name, function, arguments), all picklable.

    Args:
        size: how many processes.
        log: folder for what they print.
    """

    def __init__(self, size: int, log: Path):
        self._log, self.size, self._count = log, size, 0
        # An executor for each process: a death breaks its executor, and so only its own job.
        self._idle: list[ProcessPoolExecutor] = []
        self._running: dict[Future, tuple[str, ProcessPoolExecutor]] = {}
        log.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for executor in [*self._idle, *(executor for _, executor in self._running.values())]:
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def jobs(self) -> list[str]:
        """The names of what runs."""
        return [name for name, _ in self._running.values()]

    @property
    def has_room(self) -> bool:
        """Whether another job can start."""
        return len(self._running) < self.size

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a job; there must be room."""
        executor = self._idle.pop() if self._idle else self._started()
        self._running[executor.submit(_work, function, arguments)] = name, executor

    def _started(self) -> ProcessPoolExecutor:
        self._count += 1
        return ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_print_to,
            initargs=(self._log / f"worker{self._count}.log",),
        )

    def next(self) -> tuple[str, Any]:
        """Wait for a job to end; its name, and its result or ``{"error": {...}}``."""
        future = wait(self._running, return_when=FIRST_COMPLETED).done.pop()
        name, executor = self._running.pop(future)
        try:
            result = future.result()
        except BrokenProcessPool as error:
            return name, {"error": {"type": "WorkerDied", "message": str(error)}}
        self._idle.append(executor)
        return name, result


def _print_to(log: Path) -> None:
    stream = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    # The host writes to the descriptors, too, and must not tear the parent's lines.
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream


def _work(function: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        found = {"type": type(error).__name__, "message": str(error)}
        if isinstance(code := getattr(error, "code", None), str):
            found["code"] = code
        return {"error": found}
