"""What is done where memory runs out: products of fewer rows, then one error with numbers."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import EPMQDeviceError
from ..io.phases import peak_memory

# Rows of the smallest product that is tried on a device.
LEAST = 16
# CUDA's and ROCm's allocators, their libraries' own, and torch's for the CPU.
_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_NO_THREADS = "can't start new thread"
_LOST = ("cuda error", "cuda driver error", "hip error", "device-side assert", "nccl error")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, so that less of the same may succeed."""
    if isinstance(error, EPMQDeviceError):
        return False  # given up already
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _TEXTS)


def is_lost_device(error: BaseException) -> bool:
    """Whether a device failed: whatever is asked of it from now on fails as well."""
    if isinstance(error, EPMQDeviceError) or not isinstance(error, RuntimeError):
        return False
    return any(part in str(error).lower() for part in _LOST) and not is_out_of_memory(error)


def is_out_of_threads(error: BaseException) -> bool:
    """Whether the system gave no further thread: less of the same would not help."""
    return isinstance(error, RuntimeError) and _NO_THREADS in str(error)


def is_device_trouble(error: BaseException) -> bool:
    """Whether it is one of these three, of which :func:`device_error` tells."""
    return is_out_of_memory(error) or is_out_of_threads(error) or is_lost_device(error)


# ---- products of fewer rows ----------------------------------------------------------------------


def in_halves(step: Callable[..., None], *rows: torch.Tensor) -> None:
    """``step(*rows)``, or where an allocation fails, of halves of the rows, of quarters, ...

    Args:
        step: adds up over rows, in place; it raises before it has written anything, or not at all.
        rows: tensors of the same number of rows.

    Raises:
        EPMQDeviceError: there is no room for ``LEAST`` rows either; the sum is of no use then.
    """
    start, size = 0, max(1, len(rows[0]))
    while start < len(rows[0]):
        lack = _lack(step, [tensor[start : start + size] for tensor in rows])
        if lack is None:
            start += size
        elif size > LEAST:
            size = max(LEAST, -(-size // 2))
            forget_cached()
        else:
            raise device_error(lack, "a product of calibration rows", rows[0].device) from lack


def _lack(step: Callable[..., None], part: list[torch.Tensor]) -> BaseException | None:
    # Without its traceback, for as long as that lives, so do the tensors of its frames.
    try:
        step(*part)
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)


def forget_cached() -> None:
    """Give back what is held for later only, by garbage and by torch."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a lost device: the caller will meet it
            torch.cuda.empty_cache()


# ---- numbers -------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that can be had, and all there are; None where the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
        found = {
            key: int(size) << 10 for key, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)
        }
        return found["MemAvailable"], found["MemTotal"]
    except (OSError, KeyError):
        return None


def device_error(error: BaseException, what: str, device: torch.device | str) -> EPMQDeviceError:
    """What to say of memory or threads that ran out for good, or of a device that is gone."""
    from ..kernels.gram import ROWS

    device = torch.device(device)
    if is_lost_device(error):
        return EPMQDeviceError(
            f"{what}: `{device}` does not answer any more (`{error}`).",
            code="EPMQ-F47",
            subject=f"device `{device}`",
            remedy="Start again, in a new process: nothing else can be asked of this device. If it "
            "comes back, look at `dmesg` and `nvidia-smi -q` for errors of the memory.",
        )
    if is_out_of_threads(error):
        return EPMQDeviceError(
            f"{what}: the system gives this process no further thread (`{error}`); it has "
            f"{threading.active_count()}.",
            code="EPMQ-F46",
            subject="threads",
            remedy="Raise the limit of processes (`ulimit -u`, the `pids` limit of a container) or "
            "of memory (`ulimit -v`), or set GPTQMODEL_CPU_WORKERS to how many workers may be "
            f"started (by itself about half of the {os.cpu_count()} cores, at most 12).",
        )
    # A GPU was asked, but it may be the machine's memory that was short.
    if isinstance(error, MemoryError) or "allocate memory" in str(error).lower():
        device = torch.device("cpu")
    numbers = [f"{asked_for(error)} were asked for"]
    with contextlib.suppress(Exception):  # numbers are all that is lost here
        room, peak = free_memory(device), peak_memory(device)
        if room is not None:
            numbers.append(f"{_gib(room[0])} of {_gib(room[1])} can be had")
        numbers.append(
            f"this process has held {_gib(peak.get('gpu', peak['process']))} at its peak"
        )
    return EPMQDeviceError(
        f"{what}: the memory of `{device}` ran out: {', '.join(numbers)}.",
        code="EPMQ-F46",
        subject=f"device `{device}`",
        remedy="Lower `batch_size`: with `checkpoint` (`--resume`) the run goes on behind its last "
        f"committed layer. Shorter rows take less, too; EPMQ_CHUNK_ROWS (now {ROWS}) is how many "
        "rows are multiplied at once. Other processes may hold the rest of the memory.",
    )


@contextlib.contextmanager
def given_up(what: str, device: torch.device | str) -> Iterator[None]:
    """Within: memory or threads that run out, and devices that are lost, are said with numbers.

    Raises:
        EPMQDeviceError: that.
    """
    try:
        yield
    except Exception as error:
        if is_device_trouble(error):
            raise device_error(error, what, device) from error
        raise


def asked_for(error: BaseException) -> str:
    """How much an allocation that failed was to have, from the words of its error."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    if found is None:
        return "an unknown number of bytes"
    number, unit = found.groups()
    return _gib(int(number)) if unit == "bytes" else f"{number} {unit}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
