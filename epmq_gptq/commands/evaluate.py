"""``epmq-gptq evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, Quiet, Verbose, examples, place, running
from .completion import dtypes


@examples(
    (
        "100 items of each task (extra `eval`)",
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
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, separated by commas: hellaswag,gsm8k.")
    ] = "",
    limit: Annotated[
        float | None,
        typer.Option(help="the first items of each task, or a share below 1."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="shots; default what each task says.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Items per forward pass; `auto` for what fits on a GPU.")
    ] = "1",
    include_path: Annotated[
        Path | None, typer.Option(help="folder with YAML files of own tasks.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="through the chat template.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="run code that the model wrote (HumanEval)."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the shots and of everything else random.")] = 1234,
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
    """Evaluate a model, quantized or not, on any task of lm-eval."""
    with running(json_report, quiet, verbose) as run:
        from ..evaluation import TaskOptions, evaluate_model
        from ..evaluation.results import evaluation_document, table_of

        options = TaskOptions(
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            seed=seed,
        )
        with run.reporter.quiet_host():
            result = evaluate_model(
                model,
                [name.strip() for name in tasks.split(",") if name.strip()],
                options,
                include_path=None if include_path is None else place(include_path),
                kernel=kernel,
                dtype=dtype,
                device=device,
                say=run.reporter.step,
            )
        run.show(table_of(result))
        run.write(evaluation_document([result]))
