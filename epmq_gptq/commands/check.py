"""``epmq-gptq check``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..exit_codes import ExitCode
from .common import Json, Quiet, Verbose, examples, running


@examples(
    ("a checkpoint of ours, or of anybody's", "epmq-gptq check merged-4bit"),
    (
        "before it is served on four GPUs",
        "epmq-gptq check org/merged-4bit --engine vllm --tensor-parallel 4",
    ),
)
def check(
    checkpoint: Annotated[
        str, typer.Argument(help="A finished GPTQ checkpoint, ours or any: folder or hub id.")
    ],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="vLLM, SGLang, transformers, GPTQModel or TGI (archived); repeatable. All but TGI "
            "where none is given."
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that shall share each layer.")] = 1,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say which engines can serve a finished checkpoint, and why not.

    What counts is what its tensors hold, not what its configuration says. Exits with 0 if every
    --engine can serve it (without any: if one can), with 2 if not or if it cannot be read."""
    with running(json_report, quiet, verbose, interrupted="nothing was written.") as run:
        with run.reporter.quiet_host():
            from ..checks.engines import check_checkpoint
            from ..checks.engines.printing import print_serving

            report = check_checkpoint(
                checkpoint, engines=engine or (), tensor_parallel=tensor_parallel
            )
        print_serving(run.reporter.result, report)
        run.write(report.to_dict())
        if not report.is_served:
            raise SystemExit(ExitCode.INPUT)
