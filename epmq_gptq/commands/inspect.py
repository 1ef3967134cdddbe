"""``epmq-gptq inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import EXIT_INPUT, Reporter
from ..lineage import Given
from ..targets import check_file
from .common import Verbose, pairs, place, values, write_error


def inspect(
    target: Annotated[
        str, typer.Argument(help="A recipe (YAML file), or a merged model: folder or hub id.")
    ],
    verify: Annotated[
        str,
        typer.Option(
            help="headers: no weights; sample: up to 32 MB of each model; full: all weights, and "
            "NaN and infinities are counted."
        ),
    ] = "sample",
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file; - for stdout.")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a merged model: as in `quantize`.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value under `quantize`, over a recipe's; repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="That the run would take: for the estimate of its time.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Say what is wrong with the inputs of a run, and what it would cost, without running it.

    Exits with 2 where a run cannot succeed."""
    reporter = Reporter(verbose=verbose)
    is_piped = str(json_report) == "-"
    file = None if is_piped else json_report
    console = reporter.out
    if is_piped:
        reporter.out = reporter.err
    with reporter.exit_codes(lambda error: write_error(file, error)):
        if file is not None:
            file = place(file)
            check_file(file, "--json")
        given = Given(
            experts=pairs(expert or [], "--expert"),
            base=base,
            calibration=tuple(calibration or ()),
            quantize=values(setting or [], "--set"),
        )
        with reporter.quiet_host():
            from ..preflight.inspection import inspect as inspect_subject
            from ..preflight.inspection import read_subject
            from ..preflight.table import print_preflight

            subject = read_subject(target, given, reporter)
            result = inspect_subject(subject, verify=verify, device=device)
        if is_piped:
            console.print_json(data=result.to_dict())
        else:
            print_preflight(console, result)
        if file is not None:
            file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        if result.errors:
            raise SystemExit(EXIT_INPUT)
