"""``epmq-gptq retention``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Quiet, Verbose, examples, pairs, place, running


@examples(
    (
        "of two experts, each on the task of its name",
        "epmq-gptq retention merged-4bit --quantized 4bit.json \\\n"
        "    --expert math=math.json --expert code=code.json --merged merged.json",
    ),
    (
        "with tasks of lm-eval",
        "epmq-gptq retention merged-4bit --quantized 4bit.json \\\n"
        "    --expert math=math.json --task math=gsm8k --metric math=exact_match",
    ),
)
def retention(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The quantized checkpoint.")],
    quantized: Annotated[Path, typer.Option(help="File of `epmq-gptq evaluate DIR --json FILE`.")],
    expert: Annotated[
        list[str], typer.Option(help="name=FILE: the same of one expert; repeatable.")
    ],
    merged: Annotated[
        Path | None, typer.Option(help="The same of the merge in full precision.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The same of the base.")] = None,
    gptq: Annotated[
        Path | None, typer.Option(help="The same of the merge under plain GPTQ.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="name=TASK: what this expert is for; default the task of its name, or the only "
            "one. Repeatable."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="name=METRIC, where the task has several; default accuracy. Repeatable."),
    ] = None,
    json_report: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how much of every expert a quantized merge has kept, from evaluations of all of them.

    Writes epmq_evaluation.json into DIR, where `report` and the model card find it."""
    with running(json_report, quiet, verbose, interrupted="nothing was written.") as run:
        from ..publish.page.retention import retention_of, write_retention
        from ..publish.page.table import retention_table

        folder = place(folder)
        others = {"base": base, "merged": merged, "gptq": gptq}
        found, left = retention_of(
            folder,
            quantized=place(quantized),
            experts={name: place(Path(file)) for name, file in pairs(expert, "--expert").items()},
            others={stage: place(file) for stage, file in others.items() if file is not None},
            tasks=pairs(task or [], "--task"),
            metrics=pairs(metric or [], "--metric"),
        )
        run.show(retention_table(found))
        if left:
            run.reporter.note(f"not evaluated: {', '.join(left)}")
        run.reporter.step("retention", str(write_retention(folder, found)))
        run.write(found.to_dict())
