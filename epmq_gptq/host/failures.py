"""What the user is told of an error that a step of a run met."""

from __future__ import annotations

from gptqmodel.looper.named_module import NamedModule

from ..errors import EPMQDeviceError, EPMQError
from ..io.output import ran_full
from ..method.chunks import device_error, is_device_trouble
from .task import EPMQ


def within(error: Exception, task: EPMQ | NamedModule, doing: str) -> Exception:
    """What to raise on the main thread for an error that a worker met: it names the layer."""
    what = f"`{task.full_name}`: {doing}"
    if is_device_trouble(error):
        told = device_error(error, what, task.module.weight.device)
        told.__cause__ = error
        return told
    if isinstance(error, EPMQDeviceError) and f"`{task.full_name}`" not in error.cause:
        return error.within(what)
    if ran_full(error):
        return disk_error(error, what)
    if not isinstance(error, EPMQError) and hasattr(error, "add_note"):
        error.add_note(f"epmq_gptq: {what}")  # Python 3.11
    return error


def disk_error(error: Exception, what: str) -> EPMQError:
    """What to say where there is no room for what a run puts aside."""
    told = EPMQError(
        f"{what}: the disk ran full where a run keeps finished layers and statistics until they "
        "are saved.",
        code="EPMQ-F44",
        subject="the folder of temporary files",
        remedy="Free some space, or set the variable TMPDIR to a folder on another disk. A run "
        "with a checkpoint keeps its layers there, and goes on from what it has committed.",
    )
    told.__cause__ = error
    return told
