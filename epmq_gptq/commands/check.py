"""``epmq-gptq check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import EXIT_INPUT, Reporter
from .common import Verbose, place, write_error


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
    json_report: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file; - for stdout.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Say which engines can serve a finished checkpoint, and why not.

    What counts is what its tensors hold, not what its configuration says. Exits with 0 if every
    --engine can serve it (without any: if one can), with 2 if not or if it cannot be read."""
    from ..targets import check_file

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
        with reporter.quiet_host():
            from ..engines import check_checkpoint
            from ..engines.printing import print_serving

            report = check_checkpoint(
                checkpoint, engines=engine or (), tensor_parallel=tensor_parallel
            )
        if is_piped:
            console.print_json(data=report.to_dict())
        else:
            print_serving(console, report)
        if file is not None:
            text = json.dumps(report.to_dict(), indent=2) + "\n"
            file.write_text(text, encoding="utf-8")
        if not report.is_served:
            raise SystemExit(EXIT_INPUT)
