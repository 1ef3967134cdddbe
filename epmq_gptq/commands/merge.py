"""``epmq-gptq merge`` and ``epmq-gptq methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Json, Out, Overwrite, Quiet, Verbose, examples, pairs, place, running, values
from .completion import devices, merge_methods

if TYPE_CHECKING:
    from ..calibration.sources import CalibrationBlock


@examples(
    (
        "the plain mean, of folders or of models of the hub",
        "epmq-gptq merge --method average --expert math=./math-expert \\\n"
        "    --expert code=org/code-expert@1a2b3c4 --out merged",
    ),
    (
        "task arithmetic with a factor",
        "epmq-gptq merge --method task_arithmetic --base org/base --param lam=0.4 \\\n"
        "    --expert math=./math-expert --expert code=./code-expert --out merged",
    ),
    (
        "RegMean++, which runs the experts over rows of theirs",
        "epmq-gptq merge --method regmean_plusplus --calibration math=math.jsonl \\\n"
        "    --calibration code=code.txt --expert math=./math-expert \\\n"
        "    --expert code=./code-expert --out merged",
    ),
)
def merge(
    method: Annotated[
        str,
        typer.Option(
            help="Merge method; `epmq-gptq methods` lists them.", autocompletion=merge_methods
        ),
    ],
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
    device: Annotated[
        str,
        typer.Option(help="Where the arithmetic runs: cpu or cuda.", autocompletion=devices),
    ] = "cpu",
    overwrite: Overwrite = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge experts of one base into a new model."""
    with running(json_report, quiet, verbose) as run:
        out = place(out)
        experts = pairs(expert, "--expert")
        parameters = values(param or [], "--param")
        with run.reporter.quiet_host():
            from .pipeline import check_free, merge_with_progress

            check_free(out, overwrite=overwrite)
            rows = calibration_block(calibration, list(experts))
            result = merge_with_progress(
                run.reporter,
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
        from ..io.console import human_size

        size = human_size(result.bytes)
        run.reporter.step("merged", f"{out}: {size} in {result.tensors} tensors")
        run.write(result.to_dict())


def calibration_block(calibration: list[str] | None, experts: list[str]) -> CalibrationBlock | None:
    """What ``--calibration`` says, in the form that a recipe holds."""
    from ..calibration.arguments import parse_calibration
    from ..calibration.sources import recipe_calibration

    if not calibration:
        return None
    return recipe_calibration(parse_calibration(calibration, experts), experts)


@examples(
    ("all of them, with their papers and parameters", "epmq-gptq methods"),
    ("their names alone", "epmq-gptq methods --json - | jq '.methods | keys'"),
)
def methods(json_report: Json = None, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the merge methods, their papers and their parameters."""
    with running(json_report, quiet, verbose) as run:
        with run.reporter.quiet_host():
            from ..merging import merge_methods

            known = merge_methods()
        from .summary import methods_table

        run.show(methods_table(known))
        run.write({"methods": known})
