"""``epmq-gptq quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EPMQInputError
from .common import (
    Device,
    Full,
    Json,
    Overwrite,
    Quiet,
    Verbose,
    examples,
    pairs,
    place,
    print_checkpoint,
    running,
    values,
)
from .completion import dtypes, settings


@examples(
    (
        "everything in one file; after a kill the same command goes on where it was",
        "epmq-gptq quantize recipe.yaml --out merged-4bit --resume unfinished",
    ),
    (
        "a merged model that says itself what it was made of",
        "epmq-gptq quantize org/merged-7b --out merged-4bit \\\n"
        "    --calibration math=math.jsonl --calibration code=code.txt",
    ),
    (
        "the paper's algorithm at 3 bits",
        "epmq-gptq quantize ./merged --out merged-3bit \\\n"
        "    --set bits=3 --set profile=paper \\\n"
        "    --calibration '{file: mix.parquet, expert_column: task}'",
    ),
    (
        "write down what is known, to fill in the rest by hand",
        "epmq-gptq quantize ./merged --write-recipe recipe.yaml",
    ),
)
def quantize(
    target: Annotated[
        str,
        typer.Argument(
            help="A recipe (YAML file; its keys are below), or a merged model: folder or hub id."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new checkpoint.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a merged model: name=SPEC per expert, SPEC being a file, data_free, or what a "
            "recipe has there ('{dataset: org/x, samples: 128}'); or one YAML file with all of a "
            "recipe's block, or that block itself ('{dataset: org/x, expert_column: task}')."
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="Of a merged model: name=folder or name=org/model@revision; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Of a merged model: what the experts were fine-tuned from.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Of a merged model: key=value under `quantize`; repeatable.",
            autocompletion=settings,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of a merged model: `dtype` of a recipe.", autocompletion=dtypes),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a merged model: `seed` of a recipe.")] = None,
    write_recipe: Annotated[
        Path | None,
        typer.Option(help="Of a merged model: write what is known as a recipe, and stop."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per forward pass, instead of the recipe's.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep in this folder what it takes to go on after a kill, and go on from what an "
            "earlier attempt left there. Ctrl-C then stops at the end of a layer.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Write seconds per phase and peak memory to this file, as JSON; on a GPU each "
            "phase is waited for, which takes a little time."
        ),
    ] = None,
    full: Full = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a merged model towards its experts.

    By a recipe, or a merged model that says itself what it was made of (mergekit's configuration, a
    model card)."""
    with running(json_report, quiet, verbose) as run:
        reporter = run.reporter
        from .draft import Given
        from .targets import check_file, read_target, write_draft

        if profile is not None:
            profile = place(profile)
            check_file(profile, "--profile")
        given = Given(
            experts=pairs(expert or [], "--expert"),
            base=base,
            calibration=tuple(calibration or ()),
            quantize=values(setting or [], "--set"),
            dtype=dtype,
            seed=seed,
        )
        if write_recipe is not None:
            file = place(write_recipe)
            missing = write_draft(target, given, file, reporter, overwrite=overwrite)
            run.write({"recipe": file.name, "uncalibrated": missing})
            return
        if out is None:
            raise EPMQInputError(
                "`--out` is missing: the folder of the new checkpoint.",
                code="EPMQ-O01",
                subject="`--out`",
                remedy="Give a folder that is new or empty.",
            )
        out = place(out)
        from .pipeline import RunOptions, quantize_recipe, run_document
        from .summary import print_summary

        read = read_target(target, given, reporter)
        resume = None if resume is None else place(resume)
        options = RunOptions(out, overwrite, device, batch_size, profile is not None, resume)
        result = quantize_recipe(read, options, reporter)
        print_summary(reporter.out, result.report, result.rows, full=full)
        print_checkpoint(reporter, out)
        if resume is not None:
            reporter.note(f"{resume} is no longer needed: the checkpoint stands.")
        if profile is not None:
            profile.write_text(json.dumps(result.report.profile(), indent=2) + "\n", "utf-8")
            reporter.step("profile", str(profile))
        run.write(run_document(read, out, result) | {"host_warnings": list(reporter.host.alarms)})
