"""Where the time and the memory of a run went, by phase."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# In the order in which they come for one layer; "waiting" is what is left of the wall time.
PHASES = (
    "prepare",
    "forward",
    "expert_forward",
    "expert_reading",
    "gram",
    "fold",
    "deviation",
    "alpha",
    "solve",
    "round",
    "pack",
    "commit",
    "waiting",
)
# What the host's own timer calls that of it which is not timed here.
_HOST_FORWARD = ("capture_inputs", "pre_quant_forward", "post_quant_forward")
_HOST_PACK = ("submodule_finalize",)


_exact = contextvars.ContextVar("exact phases", default=False)


@contextlib.contextmanager
def exact_phases() -> Iterator[None]:
    """Within: a GPU is waited for at both ends of a phase, so that seconds are those of its work.

    Otherwise they are those of the host, which launches work and waits for it in a later phase.
    """
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


class Phases:
    """Seconds of each phase, each second counted once per thread.

    A phase within another one takes its seconds from the outer one. Phases of several threads may
    overlap, so their sum may be more than the wall time.

    Args:
        device: of the run. Its GPU is waited for within :func:`exact_phases` only.

    Attributes:
        seconds: phase → seconds so far.
        memory: phase → the most bytes held at an end of it, by the process, or by torch on a GPU.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._gpu = device if device.type == "cuda" else None
        self._device = device if _exact.get() and device.type == "cuda" else None
        self._lock = threading.Lock()
        self._running = threading.local()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self._in_hooks = 0.0

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time within as that of ``phase``."""
        outer = getattr(self._running, "inner", None)
        self._running.inner = 0.0
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            spent = time.perf_counter() - start
            own = spent - self._running.inner
            self._running.inner = None if outer is None else outer + spent
            self.add(phase, own)
            self._look(phase)

    @contextlib.contextmanager
    def in_hook(self, phase: str) -> Iterator[None]:
        """Like :meth:`measure`, within a forward pass, of which it is no part."""
        start = time.perf_counter()
        self._look("forward")
        try:
            with self.measure(phase):
                yield
        finally:
            with self._lock:
                self._in_hooks += time.perf_counter() - start

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        with self._lock:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def _look(self, phase: str) -> None:
        size = held_memory(self._gpu)
        with self._lock:
            self.memory[phase] = max(size, self.memory.get(phase, 0))

    def _wait(self) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)

    def result(
        self, wall: float, host: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, float]:
        """Phase → seconds, in order, of a run of ``wall`` seconds.

        Args:
            host: what the host's region timer says: region → ``{"total": seconds}``.
        """
        regions = {name: float(entry["total"]) for name, entry in (host or {}).items()}
        found = dict(self.seconds)
        forward = sum(regions.get(name, 0.0) for name in _HOST_FORWARD)
        found["forward"] = max(0.0, forward - self._in_hooks)
        found["pack"] = sum(regions.get(name, 0.0) for name in _HOST_PACK)
        found["waiting"] = max(0.0, wall - sum(found.values()))
        return {name: found[name] for name in PHASES if name in found}


def peak_memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes at the peak of the process so far, and of the GPU where ``device`` is one."""
    found = {"process": _peak_of_process()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device)
    return found


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def held_memory(gpu: torch.device | None) -> int:
    """Bytes right now, of the GPU if there is one; 0 where the system does not say."""
    if gpu is not None:
        return torch.cuda.memory_allocated(gpu)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _peak_of_process() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)[1]) * 1024
    except (OSError, TypeError):
        # Elsewhere than on Linux, where this would count what the parent had before it forked.
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
