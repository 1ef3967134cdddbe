"""``epmq-gptq evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Device, Json, Quiet, Run, Verbose, examples, place, running
from .completion import dtypes, splits, suites

if TYPE_CHECKING:
    from ..evaluation import Evaluation


@examples(
    ("on a suite that comes with the package", "epmq-gptq evaluate merged-4bit --suite text4"),
    (
        "on tasks of lm-eval (extra `eval`), 100 items of each",
        "epmq-gptq evaluate merged-4bit --tasks hellaswag,gsm8k --limit 100",
    ),
    (
        "a model of the hub, with all figures in a file",
        "epmq-gptq evaluate org/merged-7b@1a2b3c4 --tasks arc_easy --json scores.json",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Folder or hub id org/name@revision: full precision, GPTQ or AWQ."),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="vision8, text4 or seq2seq4, which need no network; repeatable.",
            autocompletion=suites,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, separated by commas (hellaswag,gsm8k); with one --suite, the "
            "tasks of it to run."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="lm-eval: the first items of each task, or a share below 1."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="lm-eval: shots; default what each task says.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Items per forward pass; lm-eval knows `auto`, too.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="lm-eval: folder with YAML files of own tasks.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="lm-eval: through the chat template.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="lm-eval: run code that the model wrote (HumanEval)."
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the suite (default 0), or of lm-eval (1234).")
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Of a suite: evaluation, or held_out for choosing options.", autocompletion=splits
        ),
    ] = "evaluation",
    quick: Annotated[
        bool, typer.Option("--quick", help="The suite's tiny version, to see that all runs.")
    ] = False,
    kernel: Annotated[
        bool,
        typer.Option(
            "--kernel",
            help="Compute with GPTQModel's kernel on a CPU as well; default there: the "
            "dequantized weights in float32. A GPU always takes the kernel.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default float32 on a CPU.", autocompletion=dtypes
        ),
    ] = None,
    device: Device = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a model on the suites that come with this package, or on any task of lm-eval."""
    with running(json_report, quiet, verbose) as run:
        from ..evaluation.request import EvaluationRequest, run_request

        request = EvaluationRequest(
            suites=tuple(suite or ()),
            tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            include_path=None if include_path is None else place(include_path),
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            seed=seed,
            split=split,
            quick=quick,
            kernel=kernel,
            dtype=dtype,
            device=device,
        )
        with run.reporter.quiet_host():
            results = run_request(model, request, run.reporter)
        _show(run, results)


def _show(run: Run, results: list[Evaluation]) -> None:
    """The tables, and all of it as JSON where that was asked for."""
    from ..evaluation.results import evaluation_document, table_of

    for result in results:
        run.show(table_of(result))
    run.write(evaluation_document(results))
