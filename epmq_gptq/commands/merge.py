"""``epmq-gptq merge`` and ``epmq-gptq methods``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..console import Reporter
from ..summary import columns, human_size
from .common import Out, Overwrite, Verbose, pairs, place, values

if TYPE_CHECKING:
    from ..calibration_names import CalibrationBlock


def merge(
    method: Annotated[str, typer.Option(help="Merge method; `epmq-gptq methods` lists them.")],
    expert: Annotated[
        list[str], typer.Option(help="name=folder or name=org/model@revision; once per expert.")
    ],
    out: Out,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id the experts were fine-tuned from.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="key=value, an option of the method; repeatable.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a method that needs calibration: name=SPEC per expert, SPEC being a file or "
            "what a recipe has there ('{dataset: org/x, samples: 256}'); or one YAML file with all "
            "of a recipe's block, or that block itself."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Calibration rows per forward pass.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the drawing of calibration rows.")] = 0,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu or cuda.")] = "cpu",
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Merge experts of one base into a new model."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes():
        out = place(out)
        experts = pairs(expert, "--expert")
        parameters = values(param or [], "--param")
        with reporter.quiet_host():
            from ..pipeline import check_free, merge_with_progress

            check_free(out, overwrite=overwrite)
            rows = _rows(calibration, list(experts))
            result = merge_with_progress(
                reporter,
                method,
                base=base,
                experts=experts,
                out=out,
                parameters=parameters,
                overwrite=overwrite,
                device=device,
                calibration=rows,
                batch_size=batch_size,
                seed=seed,
            )
        reporter.step("merged", f"{out}: {human_size(result.bytes)} in {result.tensors} tensors")


def _rows(calibration: list[str] | None, experts: list[str]) -> CalibrationBlock | None:
    """What ``--calibration`` says, in the form that a recipe holds."""
    from ..calibration_names import recipe_calibration
    from ..lineage.sources import parse_calibration

    if not calibration:
        return None
    return recipe_calibration(parse_calibration(calibration, experts), experts)


def methods() -> None:
    """List the merge methods, their papers and their parameters."""
    reporter = Reporter()
    with reporter.exit_codes():
        with reporter.quiet_host():
            from ..merging import merge_methods

            known = merge_methods()
        for name, about in known.items():
            reporter.out.print(_method_lines(name, about), "")


def _method_lines(name: str, about: Mapping[str, Any]) -> Table:
    lines = [
        (name, about["summary"]),
        ("", f"{about['title']}, {about['reference']}"),
        ("", "needs --base" if about["needs_base"] else "does without --base"),
        *([("", "needs --calibration")] if about["needs_calibration"] else []),
    ]
    for parameter, option in about["parameters"].items():
        default = json.dumps(option["default"], default=str)
        lines.append((f"  {parameter}", f"{option['doc']} ({option['rule']}; default {default})"))
    return columns(lines)
