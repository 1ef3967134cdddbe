"""``epmq-gptq quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..console import Reporter
from ..errors import EPMQInputError
from ..lineage import Given
from ..summary import print_summary
from ..targets import check_file, read_target, write_draft
from .common import Overwrite, Verbose, pairs, place, print_checkpoint, values, write_error

if TYPE_CHECKING:
    from ..pipeline import RunResult
    from ..recipe import Recipe


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
        typer.Option("--set", help="Of a merged model: key=value under `quantize`; repeatable."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a merged model: `dtype` of a recipe.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a merged model: `seed` of a recipe.")] = None,
    write_recipe: Annotated[
        Path | None,
        typer.Option(help="Of a merged model: write what is known as a recipe, and stop."),
    ] = None,
    overwrite: Overwrite = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where torch sees one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per forward pass, instead of the recipe's.")
    ] = None,
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers of the run to this file.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Write seconds per phase and peak memory to this file, as JSON; on a GPU each "
            "phase is waited for, which takes a little time."
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show every layer, however many.")] = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a merged model towards its experts: one with a recipe, or one that says itself
    what it was merged from (mergekit's configuration, a model card)."""
    reporter = Reporter(verbose=verbose)
    with reporter.exit_codes(lambda error: write_error(json_report, error)):
        if json_report is not None:
            json_report = place(json_report)
            check_file(json_report, "--json")
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
            write_draft(target, given, place(write_recipe), reporter, overwrite=overwrite)
            return
        if out is None:
            raise EPMQInputError(
                "`--out` is missing: the folder of the new checkpoint.",
                code="EPMQ-O01",
                subject="`--out`",
                remedy="Give a folder that is new or empty.",
            )
        out = place(out)
        from ..pipeline import RunOptions, quantize_recipe

        read = read_target(target, given, reporter)
        options = RunOptions(out, overwrite, device, batch_size, profile is not None)
        result = quantize_recipe(read, options, reporter)
        print_summary(reporter.out, result.report, result.rows, full=full)
        print_checkpoint(reporter, out)
        if json_report is not None:
            _write_report(json_report, read, out, result, reporter)
        if profile is not None:
            profile.write_text(json.dumps(result.report.profile(), indent=2) + "\n", "utf-8")
            reporter.step("profile", str(profile))


def _write_report(
    file: Path, recipe: Recipe, out: Path, result: RunResult, reporter: Reporter
) -> None:
    """All numbers of a run, for ``--json``."""
    report = {
        "epmq_gptq": __version__,
        "recipe": recipe.to_options(),
        "checkpoint": out.name,
        "cut_rows": {name: rows.cut for name, rows in result.rows.items()},
        "report": result.report.to_dict(),
        "host_warnings": list(reporter.host.alarms),
    }
    file.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    reporter.step("report", str(file))
