"""What a checkpoint's folder knows about itself: the facts of a model card, of checked types.

The folder may come from a stranger, so nothing in it is believed to have the type it should.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks.serving import Export, check_serving
from ..errors import EPMQInputError
from ..experts.linears import Linear
from ..io.checkpoints import Checkpoint
from ..io.folders import read_json
from .card_sources import Agreed, Part, agreed, parts_of

REPORT, EVALUATION = "epmq_report.json", "epmq_evaluation.json"
# Of a report: a line per module and expert.
MAX_REPORT_BYTES = 500_000_000
WHAT = "the checkpoint"


@dataclass(frozen=True)
class Facts:
    """All that a card tells.

    Attributes:
        config: what ``config.json`` holds.
        record: the provenance, ``meta.epmq``.
        export: how the layers are quantized.
        linears: the quantized layers.
        engines: engine → version, verdict and reasons, see :mod:`epmq_gptq.checks.serving`.
        parts: base, merged model and experts.
        sources: what these declare alike.
        report: of the run, {} where it is not there.
        retention: expert → its scores, {} where nothing was evaluated.
    """

    config: dict[str, Any]
    record: Mapping[str, Any]
    export: Export
    linears: list[Linear]
    engines: dict[str, Any]
    parts: list[Part]
    sources: Agreed
    report: Mapping[str, Any]
    retention: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Of the configuration."""
        return str(self.config.get("model_type", ""))

    @property
    def experts(self) -> list[Part]:
        """The experts among the parts."""
        return [part for part in self.parts if part.role == "expert"]

    @property
    def bits(self) -> list[int]:
        """The widths in use, in ascending order."""
        settings = (self.export.of(linear.name) for linear in self.linears)
        return sorted({each.bits for each in settings if each is not None}) or [self.export.bits]


def read_facts(folder: Path, folders: Mapping[str, Path]) -> Facts:
    """The facts of the checkpoint in ``folder``.

    Args:
        folder: of a checkpoint that E-PMQ made.
        folders: of its sources, see :func:`~epmq_gptq.publish.card_sources.declared_by`.

    Raises:
        EPMQInputError: it cannot be read, or E-PMQ did not make it.
    """
    checkpoint = Checkpoint(folder, what=WHAT)
    checkpoint.close()
    quantization = read_json(folder, "quantize_config.json", WHAT)
    record = mapping(mapping(quantization.get("meta")).get("epmq"))
    if not record:
        raise EPMQInputError(
            f"{WHAT}: `{folder.name}` does not say that E-PMQ made it (`meta.epmq` in "
            "`quantize_config.json`).",
            code="EPMQ-P01",
            subject="`quantize_config.json`",
            remedy="Give a folder that `save` of an E-PMQ run wrote.",
        )
    config = checkpoint.config()
    export, linears = read_export(quantization), quantized_linears(checkpoint)
    parts = parts_of(record)
    return Facts(
        config=config,
        record=record,
        export=export,
        linears=linears,
        engines=check_serving(export, linears, config)[1],
        parts=parts,
        sources=agreed(parts, folders),
        report=mapping(_optional(folder, REPORT).get("report")),
        retention=mapping(_optional(folder, EVALUATION).get("experts")),
    )


def read_export(quantization: Mapping[str, Any]) -> Export:
    """How a ``quantize_config.json`` says that layers are quantized.

    Raises:
        EPMQInputError: a setting is missing, or none that there is.
    """
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    dynamic = quantization.get("dynamic")
    problem = ""
    if not _is_count(bits) or not 2 <= bits <= 8:
        problem = f"`bits` should be 2 to 8, got {bits!r}"
    elif not _is_count(group_size) or not (group_size == -1 or group_size > 0):
        problem = f"`group_size` should be -1 or positive, got {group_size!r}"
    elif dynamic is not None and not _is_dynamic(dynamic):
        problem = "`dynamic` should map patterns of names to settings"
    if problem:
        raise EPMQInputError(
            f"{WHAT}: in `quantize_config.json` {problem}.",
            code="EPMQ-P01",
            subject="`quantize_config.json`",
            remedy="Save the checkpoint again.",
        )
    return Export(
        bits,
        group_size,
        quantization.get("sym") is not False,
        quantization.get("desc_act") is True,
        dynamic or None,
        quantization.get("lm_head") is True,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dynamic(dynamic: Any) -> bool:
    if not isinstance(dynamic, Mapping):
        return False
    with contextlib.suppress(re.error):
        for pattern, settings in dynamic.items():
            re.compile(pattern.removeprefix("-:").removeprefix("+:"))
            if not (pattern.startswith("-:") or isinstance(settings, Mapping)):
                return False
        return True
    return False


def quantized_linears(checkpoint: Checkpoint) -> list[Linear]:
    """The packed layers of a checkpoint, from its headers."""
    linears = []
    for name in checkpoint:
        module = name.removesuffix(".qweight")
        if module == name or f"{module}.g_idx" not in checkpoint:
            continue
        inputs = checkpoint.info(f"{module}.g_idx").numel
        outputs = checkpoint.info(name).shape[-1:] or (0,)
        linears.append(Linear(module, (outputs[0], inputs), ()))
    return linears


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, {} in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, None in place of anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return value if math.isfinite(value) else None
    return None


def _optional(folder: Path, name: str) -> dict[str, Any]:
    """A file that need not be there.

    Raises:
        EPMQInputError: it is there and cannot be read.
    """
    if not (folder / name).exists():
        return {}
    return read_json(folder, name, WHAT, max_bytes=MAX_REPORT_BYTES)
