"""``epmq-gptq inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..exit_codes import ExitCode
from .common import Json, Quiet, Verbose, examples, pairs, running, values
from .completion import devices, settings, verifications


@examples(
    ("everything that a run of this recipe would use", "epmq-gptq inspect recipe.yaml"),
    (
        "a merged model that says itself what it was made of, without its weights",
        "epmq-gptq inspect org/merged-7b --verify headers",
    ),
    (
        "would 3 bits in groups of 64 be served?",
        "epmq-gptq inspect recipe.yaml --set bits=3 --set group_size=64",
    ),
    (
        "in a script: 2 if a run cannot succeed, and why",
        "epmq-gptq inspect recipe.yaml --json - | jq '.findings[] | [.code, .cause]'",
    ),
)
def inspect(
    target: Annotated[
        str,
        typer.Argument(help="A recipe (YAML file), or a merged model: folder or hub id."),
    ],
    verify: Annotated[
        str,
        typer.Option(
            help="headers: no weights; sample: up to 32 MB of each model; full: all weights, and "
            "NaN and infinities are counted.",
            autocompletion=verifications,
        ),
    ] = "sample",
    calibration: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="Of a merged model: as in `quantize`; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a merged model: as in `quantize`.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value under `quantize`, over a recipe's; repeatable.",
            autocompletion=settings,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="That the run would take: for the estimate of its time.", autocompletion=devices
        ),
    ] = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what is wrong with the inputs of a run, and what it would cost, without running it.

    Exits with 2 where a run cannot succeed."""
    with running(json_report, quiet, verbose) as run:
        from .draft import Given

        given = Given(
            experts=pairs(expert or [], "--expert"),
            base=base,
            calibration=tuple(calibration or ()),
            quantize=values(setting or [], "--set"),
        )
        with run.reporter.quiet_host():
            from ..checks.table import print_preflight
            from .inspection import inspect as inspect_subject
            from .inspection import read_subject

            subject = read_subject(target, given, run.reporter)
            result = inspect_subject(subject, verify=verify, device=device)
        print_preflight(run.reporter.result, result)
        run.write(result.to_dict())
        if result.errors:
            raise SystemExit(ExitCode.INPUT)
