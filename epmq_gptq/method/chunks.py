"""What is done where memory runs out: fewer rows at once, then the CPU, then an error with numbers.

Steps that are tried again must not have written anything by then. All of ours allocate what they
need before they write, and a product that is added in place either comes whole or not at all.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import EPMQDeviceError
from ..io.phases import peak_memory

T = TypeVar("T")

# Rows of the smallest product that is tried on a device.
LEAST = 16
# Outputs of a product that are computed at once where memory is short.
_PIECE = 256
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


# ---- fewer rows, then the CPU --------------------------------------------------------------------


def in_halves(
    step: Callable[..., None], *rows: torch.Tensor, otherwise: Callable[..., None]
) -> None:
    """``step(*rows)``, or where there is no room for it, of halves of the rows, of quarters, ...

    Args:
        step: adds up over rows; raises before it has written anything, or not at all.
        rows: tensors of the same number of rows.
        otherwise: does the same for rows of which not even ``LEAST`` fit.
    """
    start, size = 0, max(1, len(rows[0]))
    while start < len(rows[0]):
        part = [tensor[start : start + size] for tensor in rows]
        if not _fits(step, part):
            if size > LEAST:
                size = max(LEAST, -(-size // 2))
                _empty_cache(rows[0].device)
                continue
            otherwise(*part)
        start += size


def _fits(step: Callable[..., None], part: list[torch.Tensor]) -> bool:
    # A function, for as long as the exception lives, so do the tensors of its frames.
    try:
        step(*part)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False


def add_on_cpu(C: torch.Tensor, L: torch.Tensor, R: torch.Tensor, alpha: float = 1.0) -> None:
    """``C += alpha Lᵀ R`` with products on the CPU, some outputs at a time.

    Args:
        C: ``(k, d)`` fp32, anywhere.
        L: ``(n, k)`` floating.
        R: ``(n, d)`` floating.

    Raises:
        EPMQDeviceError: there is no room for that either; ``C`` is of no use then.
    """
    with given_up("a product of calibration rows", C.device):
        left, right = (tensor.to("cpu", torch.float32) for tensor in (L, R))
        for start in range(0, len(C), _PIECE):
            piece = C[start : start + _PIECE]
            product = (left[:, start : start + _PIECE].t() @ right).mul_(alpha)
            piece.add_(product.to(C.device))


def with_room(step: Callable[..., T], *values: Any) -> T:
    """``step(*values)``, or where there is no room for it, the same of copies on the CPU.

    Values that lie on several devices, as they do where some were left on the CPU, are all brought
    there first.

    Args:
        step: must leave its values as they were where it raises for lack of memory.
        values: tensors, or tuples, lists and dicts with tensors.
    """
    given = on_cpu(values) if len(devices_of(values)) > 1 else values

    def there() -> T:
        forget_cached()
        return step(*on_cpu(given))

    return or_else(lambda: step(*given), there)


def made_on(device: torch.device, make: Callable[[torch.device], T]) -> T:
    """``make(device)``, or where there is no room for it there, ``make`` of the CPU."""

    def there() -> T:
        forget_cached()
        return make(torch.device("cpu"))

    return or_else(lambda: make(device), there)


def or_else(step: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """``step()``, or where there is no room for it ``otherwise()``."""
    try:
        return step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Not within the block: for as long as the exception lives, so do the tensors of its frames.
    return otherwise()


def on_cpu(value: Any) -> Any:
    """The value with its tensors on the CPU."""
    return moved(value, torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors there; one that it holds twice is one there, too."""
    known: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.to(device)
        return known[id(tensor)]

    return mapped(move, value)


def devices_of(value: Any) -> set[torch.device]:
    """Where the tensors among its tuples, lists and dicts lie."""
    return {one.device for one in leaves(value) if isinstance(one, torch.Tensor)}


def leaves(value: Any) -> Iterator[Any]:
    """What its tuples, lists and dicts hold in the end."""
    if isinstance(value, (tuple, list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value


def mapped(step: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The value with ``step`` of every tensor among its tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return step(value)
    if isinstance(value, dict):
        return {key: mapped(step, one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [mapped(step, one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def forget_cached() -> None:
    """Give back what is held for later only, by garbage and by torch."""
    gc.collect()
    _empty_cache()


def _empty_cache(device: torch.device | None = None) -> None:
    if torch.cuda.is_initialized() and (device is None or device.type == "cuda"):
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
        remedy=f"Set a smaller `batch_size` or give shorter rows; EPMQ_CHUNK_ROWS (now {ROWS}) is "
        "how many rows are multiplied at once. Other processes may hold the rest of the memory.",
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


# ---- not too many at once ------------------------------------------------------------------------


class Rooms:
    """Lets as many steps work on a GPU at once as fit into its memory, and one always.

    The host rounds with four workers per GPU; of wide layers their buffers together are more than
    what is free. On the CPU nothing waits.

    Args:
        free: device → bytes that can be had. Asked while no step is at work there, since those at
            work hold what they said they would.
    """

    def __init__(self, free: Callable[[torch.device], tuple[int, int] | None] = free_memory):
        self._free = free
        self._changed = threading.Condition()
        self._held: dict[torch.device, list[int]] = {}
        self._limits: dict[torch.device, int] = {}

    @contextlib.contextmanager
    def of(self, device: torch.device | str, size: int) -> Iterator[bool]:
        """Within: ``size`` bytes more are held. Gives whether they are known to be there."""
        device = torch.device(device)
        if device.type == "cpu":
            yield True
            return
        with self._changed:
            held = self._held.setdefault(device, [])
            while held and sum(held) + size > self._limits[device]:
                self._changed.wait()
            if not held:
                self._limits[device] = self._known(device)
            fits = size <= self._limits[device]
            held.append(size)
        try:
            yield fits
        finally:
            with self._changed:
                held.remove(size)
                self._changed.notify_all()

    def _known(self, device: torch.device) -> int:
        try:
            return self._free(device)[0]
        except (RuntimeError, TypeError):  # a lost device says so where it is used
            return 0


ROOMS = Rooms()
