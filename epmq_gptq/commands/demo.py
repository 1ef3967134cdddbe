"""``epmq-gptq demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import EPMQInputError
from .common import Json, Out, Overwrite, Quiet, Verbose, examples, place, print_checkpoint, running
from .completion import merge_methods


@examples(
    ("the whole way on an embedded example, in minutes on a CPU", "epmq-gptq demo"),
    ("only to see that everything runs", "epmq-gptq demo --quick --out /tmp/demo"),
    (
        "3 bits, of a TIES merge, in place of the run before",
        "epmq-gptq demo --bits 3 --method ties --overwrite",
    ),
)
def demo(
    out: Out = Path("demo-4bit"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, only to see that everything runs.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Bits of all methods.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights per scale.")] = 32,
    alpha: Annotated[
        float | None,
        typer.Option(help="Strength of E-PMQ's anchor to the merge; default: chosen by itself."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Merge method.", autocompletion=merge_methods)
    ] = "average",
    awq: Annotated[bool, typer.Option("--awq", help="Also GPTQModel's AWQ (minutes).")] = False,
    seed: Annotated[int, typer.Option(help="Of the models and the data.")] = 0,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again although models are cached.")
    ] = False,
    overwrite: Overwrite = False,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train small experts, merge and quantize them, and compare the methods. Needs no network."""
    with running(json_report, quiet, verbose) as run:
        out = place(out)
        check_bits = {"bits": bits, "group_size": group_size}
        for name, value in check_bits.items():
            if value < 1:
                option = f"`--{name.replace('_', '-')}`"
                raise EPMQInputError(
                    f"{option} should be positive, got {value}.",
                    code="EPMQ-F33",
                    subject=option,
                    remedy="Leave it out for the default.",
                )
        from ..evaluation.demo import DemoOptions, run_demo

        options = DemoOptions(
            out=out,
            alpha=alpha,
            awq=awq,
            seed=seed,
            merge_method=method,
            quick=quick,
            retrain=retrain,
            overwrite=overwrite,
            **check_bits,
        )
        result = run_demo(options, run.reporter.out, quiet=not verbose)
        if quiet:  # otherwise it is part of what was said on the way
            from ..evaluation.demo.table import result_table

            run.show(result_table(result))
        print_checkpoint(run.reporter, out)
        run.write(result.to_dict())
