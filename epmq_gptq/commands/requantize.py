"""``epmq-gptq requantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Device,
    Full,
    Json,
    Overwrite,
    Quiet,
    Verbose,
    examples,
    place,
    print_checkpoint,
    running,
    values,
)
from .completion import dtypes, settings


@examples(
    (
        "8 bits in place of 4",
        "epmq-gptq requantize --from-statistics merged-4bit --merged ./merged \\\n"
        "    --set bits=8 --out merged-8bit",
    ),
    (
        "without one of the experts, and with a stronger anchor",
        "epmq-gptq requantize --from-statistics merged-4bit --merged ./merged \\\n"
        "    --leave-out code --set alpha=1 --out without-code",
    ),
)
def requantize(
    statistics: Annotated[
        Path,
        typer.Option(
            "--from-statistics",
            help="What `save_statistics: true` kept: its folder, or the checkpoint.",
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
            autocompletion=settings,
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="That weights are computed in; default: as recorded.", autocompletion=dtypes
        ),
    ] = None,
    full: Full = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a merge anew from statistics that a run kept: no rows, no forward pass.

    With other bits, alphas or weights, or without one of the experts."""
    with running(json_report, quiet, verbose) as run:
        from ..host.recorded.run import requantize_folder
        from .summary import print_summary

        out = place(out)
        with run.reporter.quiet_host():
            report = requantize_folder(
                place(statistics),
                out,
                run.reporter,
                merged=merged,
                leave_out=leave_out or [],
                settings=values(setting or [], "--set"),
                device=device,
                dtype=dtype,
                overwrite=overwrite,
            )
        print_summary(run.reporter.out, report, {}, full=full)
        print_checkpoint(run.reporter, out)
        run.write({"checkpoint": out.name, "report": report.to_dict()})
