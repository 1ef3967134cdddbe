"""Which of several kernels is used on a GPU: the fastest of those that are right there.

Neither follows from a version number. So every kernel is asked on the device itself, once per
shape, and one that is missing or not exact is never used.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What a sum of products may differ from float64, relative to the norms of its factors.
TOLERANCE = 4e-6


def has_triton() -> bool:
    """Whether Triton is installed; it is imported by those who use it alone."""
    return importlib.util.find_spec("triton") is not None


def fastest(
    ways: Sequence[Callable[..., None]],
    arguments: Sequence[Any],
    agrees: Callable[[Callable[..., None]], bool],
    *,
    what: str,
    seconds: Callable[[Callable[..., None], Sequence[Any]], float] | None = None,
) -> Callable[..., None]:
    """The fastest of the ways that agree with their reference.

    Args:
        ways: in order of preference; the last is the reference itself, and needs no check.
        arguments: of a race; they are written to.
        agrees: whether one is right; raising counts as no.
        what: for the warning where the reference alone is left.
        seconds: times one; by default with CUDA events.
    """
    *candidates, reference = ways
    right = [way for way in candidates if _is_right(way, agrees)]
    if not right:
        warnings.warn(
            f"no fast kernel for {what} is exact on this device, so torch's fp32 is used: the "
            "same result, in more time.",
            stacklevel=2,
        )
        return reference
    time = seconds or gpu_seconds
    return min([*right, reference], key=lambda way: time(way, arguments))


def _is_right(way: Callable[..., None], agrees: Callable[[Callable[..., None]], bool]) -> bool:
    try:
        return agrees(way)
    except Exception:  # whatever is missing here: another way will do
        return False


def gpu_seconds(way: Callable[..., None], arguments: Sequence[Any]) -> float:
    """The best of three runs on a GPU, after one that may compile."""
    way(*arguments)
    best = float("inf")
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way(*arguments)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best
