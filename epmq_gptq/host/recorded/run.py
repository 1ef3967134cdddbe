"""One requantization, from a command or a function: checked, run under a bar, saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EPMQInputError
from ...io.yaml_files import resolve_path

if TYPE_CHECKING:
    from ...io.console import Reporter
    from ...run_report import QuantizationReport

# What is said beside the options of EPMQConfig, in ways of its own.
_NOT_SETTINGS = ("merged", "statistics", "device", "dtype", "progress", "leave_out")


def requantize_folder(
    statistics: Path,
    out: Path,
    reporter: Reporter,
    *,
    merged: str | None = None,
    leave_out: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantize a merge from recorded statistics and save it.

    Args:
        statistics: a bundle, or a checkpoint that holds one.
        out: folder of the new checkpoint.
        merged: folder or hub id; None where the statistics name one of a hub.
        leave_out: experts that shall not count.
        settings: options of ``EPMQConfig`` in place of the recorded ones.
        device: "cpu" or "cuda"; None for a GPU where there is one.
        dtype: that weights are computed in; None for that of the recorded run.
        overwrite: replace what is in ``out``.

    Raises:
        EPMQInputError, EPMQNumericalError: as of ``requantize``.
    """
    from ...io.console import StepProgress
    from ...io.output import check_output
    from .bundle import Bundle
    from .requantize import requantize

    settings = dict(settings or {})
    for name in _NOT_SETTINGS:
        if name in settings:
            raise EPMQInputError(
                f"`{name}` is not an option of EPMQConfig.",
                code="EPMQ-O02",
                subject=f"`{name}`",
                remedy="It has a place of its own, or none.",
            )
    bundle = Bundle(statistics)
    check_output(out, {"statistics": bundle.folder}, overwrite)
    counted = [name for name in bundle.experts if name not in leave_out]
    reporter.step("statistics", f"{len(bundle.layers)} modules, experts {', '.join(counted)}")
    if merged is not None and resolve_path(merged, Path()).exists():
        merged = str(resolve_path(merged, Path()))
    with StepProgress(reporter, "requantize", len(bundle.layers), "modules") as progress:

        def advance(*, stage: str, layer_idx: int, module_names: list[str], **_) -> None:
            if stage == "quant_complete":
                progress.advance(len(module_names), f"layer {layer_idx}")

        model = requantize(
            bundle,
            merged,
            leave_out=leave_out,
            device=device,
            dtype=dtype,
            progress=advance,
            **settings,
        )
    reporter.step("save", str(out))
    with contextlib.closing(model.quantize_config):
        model.save(str(out), overwrite=overwrite)
    return model.epmq_report
