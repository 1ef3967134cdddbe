"""``epmq-gptq requantize``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..console import Reporter, StepProgress
from ..errors import EPMQInputError
from ..summary import print_summary
from ..targets import check_file
from .common import Overwrite, Verbose, place, print_checkpoint, values, write_error


def requantize(
    statistics: Annotated[
        Path,
        typer.Option(
            "--from-statistics",
            help="Statistics that `save_statistics: true` kept: their folder, or the checkpoint.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    merged: Annotated[
        str | None,
        typer.Option(
            help="The merged model: folder or hub id; may be left out where the statistics are of "
            "one on the hub."
        ),
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="An expert that shall not count; repeatable.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value in place of what was recorded: alpha, alpha_pattern, bits, group_size, "
            "expert_weights, weighting, dynamic, …; repeatable.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where torch sees one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="That weights are computed in; default: as recorded.")
    ] = None,
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers of the run to this file.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show every layer, however many.")] = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a merge anew from recorded statistics: other bits, alphas or weights, or without
    one of the experts; no calibration rows and no forward pass."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes(lambda error: write_error(json_report, error)):
        if json_report is not None:
            json_report = place(json_report)
            check_file(json_report, "--json")
        out = place(out)
        options = values(setting or [], "--set")
        with reporter.quiet_host():
            report = _run(
                reporter, place(statistics), merged, out, leave_out or [], options,
                overwrite=overwrite, device=device, dtype=dtype,
            )  # fmt: skip
        print_summary(reporter.out, report, {}, full=full)
        print_checkpoint(reporter, out)
        if json_report is not None:
            record = {"epmq_gptq": __version__, "checkpoint": out.name, "report": report.to_dict()}
            json_report.write_text(json.dumps(record, indent=2, default=str) + "\n", "utf-8")
            reporter.step("report", str(json_report))


def _run(
    reporter: Reporter,
    statistics: Path,
    merged: str | None,
    out: Path,
    leave_out: list[str],
    options: dict[str, Any],
    *,
    overwrite: bool,
    device: str | None,
    dtype: str | None,
):
    from ..options import resolve_path
    from ..output import check_output
    from ..recorded.bundle import Bundle
    from ..recorded.requantize import requantize as run

    bundle = Bundle(statistics)
    check_output(out, {"statistics": bundle.folder}, overwrite)
    counted = [name for name in bundle.experts if name not in leave_out]
    reporter.step("statistics", f"{len(bundle.layers)} modules, experts {', '.join(counted)}")
    if merged is not None and resolve_path(merged, Path()).exists():
        merged = str(resolve_path(merged, Path()))
    for name in ("merged", "statistics", "device", "dtype", "progress", "leave_out"):
        if name in options:
            raise EPMQInputError(
                f"`--set {name}` is not an option of EPMQConfig.",
                code="EPMQ-O02",
                subject="`--set`",
                remedy="It is an option of this command, or none.",
            )
    with StepProgress(reporter, "requantize", len(bundle.layers), "modules") as progress:

        def advance(*, stage: str, layer_idx: int, module_names: list[str], **_) -> None:
            if stage == "quant_complete":
                progress.advance(len(module_names), f"layer {layer_idx}")

        model = run(
            bundle,
            merged,
            leave_out=leave_out,
            device=device,
            dtype=dtype,
            progress=advance,
            **options,
        )
    reporter.step("save", str(out))
    with contextlib.closing(model.quantize_config):
        model.save(str(out), overwrite=overwrite)
    return model.epmq_report
