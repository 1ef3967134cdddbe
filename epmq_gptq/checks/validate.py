"""Whether a GPTQ checkpoint is whole and says one thing: the check of every save and every push."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import EPMQInputError
from ..experts.weights import check_finite
from ..io.checkpoints import Checkpoint
from ..io.folders import read_json
from .engines.checkpoint import CONFIG, QUANTIZE_CONFIG, Reading, read_checkpoint
from .engines.packed import PACKED

# Where the two configuration files say the same thing, they must agree.
SHARED = ("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "pack_dtype")
_CODE = "EPMQ-P01"
_REMEDY = "Save the checkpoint again, or correct the file."


def validate(checkpoint: Checkpoint, planned: Iterable[str] | None = None) -> Reading:
    """Refuse a GPTQ checkpoint that is not whole, or whose files contradict one another.

    Both configuration files are there and agree; every packed layer has its four parts, of shapes
    that fit one another and the configuration, and no other weight beside them; ``g_idx`` names
    groups that there are; every floating value is finite.

    Args:
        checkpoint: on this machine; all of its floating tensors are read.
        planned: full names of the layers that must be packed, and no others; None for any.

    Raises:
        EPMQInputError: naming the file, the tensor or the layer.
        EPMQNumericalError: a value is not finite.
    """
    folder, what = checkpoint.path, checkpoint.what
    inner = read_json(folder, CONFIG, what).get("quantization_config")
    outer = read_json(folder, QUANTIZE_CONFIG, what)
    for fault in _files(inner, outer):
        raise _refusal(checkpoint, fault)
    reading = read_own(checkpoint, outer)
    for fault in _layers(checkpoint, reading, planned, outer.get("pack_dtype", "int32")):
        raise _refusal(checkpoint, fault)
    for name in checkpoint:
        if checkpoint.info(name).torch_dtype is not None:
            what = f"{checkpoint.what}: `{name}`"
            check_finite(checkpoint.read(name), what, remedy="Quantize the merge again.")
    return reading


def read_own(checkpoint: Checkpoint, quantize_config: Mapping[str, Any]) -> Reading:
    """What is in a checkpoint that we made, from its headers and configuration alone.

    Raises:
        EPMQInputError: nothing in it is packed, or a setting is none that there is.
    """
    try:
        return read_checkpoint(checkpoint, quantize_config, limit=0)
    except EPMQInputError as error:
        raise EPMQInputError(
            error.cause, code=_CODE, subject=error.subject, remedy=_REMEDY
        ) from error


def _refusal(checkpoint: Checkpoint, fault: tuple[str, str]) -> EPMQInputError:
    cause, subject = fault
    return EPMQInputError(
        f"{checkpoint.what}: {cause}.", code=_CODE, subject=subject, remedy=_REMEDY
    )


def _files(inner: Any, outer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the two configuration files: the cause, and what it is about."""
    for file, block in ((CONFIG, inner), (QUANTIZE_CONFIG, outer)):
        if not isinstance(block, Mapping) or "bits" not in block:
            yield f"it lacks the quantization in `{file}`", f"`{file}`"
    for key in SHARED:
        if key in inner and key in outer and inner[key] != outer[key]:
            yield (
                f"it has `{key}` {inner[key]!r} in `{CONFIG}` and {outer[key]!r} in "
                f"`{QUANTIZE_CONFIG}`",
                f"`{key}`",
            )


def _layers(
    checkpoint: Checkpoint, reading: Reading, planned: Iterable[str] | None, words: str
) -> Iterator[tuple[str, str]]:
    """What is wrong with the packed layers."""
    names = [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]
    for name in names:
        for part in PACKED:
            if f"{name}.{part}" not in checkpoint:
                yield f"it lacks `{name}.{part}`", f"module `{name}`"
    odd = sorted(set(names) ^ set(names if planned is None else planned))
    if odd:
        yield f"it has other packed layers than were quantized: `{odd[0]}`", f"module `{odd[0]}`"
    if words != "int32":
        return  # shapes are those of other words then, and so are engines that take them
    stored = reading.facts.stored
    for text in (*stored.faults, *(each for texts in stored.unlike.values() for each in texts)):
        yield text, "`quantization_config`"
    for name, shape in reading.shapes.items():
        group = checkpoint.read(f"{name}.g_idx")
        if int(group.min()) < 0 or int(group.max()) >= shape.groups:
            yield f"it holds `{name}.g_idx` beyond its {shape.groups} groups", f"module `{name}`"
