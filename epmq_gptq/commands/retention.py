"""``retention``: how much of every expert a quantized merge has kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter
from . import forms
from .operation import Result, operation

if TYPE_CHECKING:
    from ..publish.page.retention import Retention


@dataclass(frozen=True, repr=False)
class RetentionResult(Result):
    """How much of every expert is kept.

    Attributes:
        retention: the figures.
        out: the file that they were written to.
    """

    retention: "Retention"
    out: Path

    def to_dict(self) -> dict[str, Any]:
        return self.retention.to_dict()

    def print_to(self, console: Console) -> None:
        from ..publish.page.table import retention_table

        console.print(retention_table(self.retention))

    def show(self, reporter: Reporter) -> None:
        self.print_to(reporter.result)
        reporter.step("retention", str(self.out))

    def __repr__(self) -> str:
        return f"<RetentionResult: {len(self.retention.experts)} experts>"


@operation(
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
    interrupted="nothing was written.",
)
def retention(
    folder: Annotated[
        str | Path, typer.Argument(metavar="DIR", help="The quantized checkpoint."), forms.PATH
    ],
    *,
    quantized: Annotated[
        str | Path,
        typer.Option(help="File of `epmq-gptq evaluate DIR --json FILE`."),
        forms.PATH,
    ],
    experts: Annotated[
        Mapping[str, str | Path],
        typer.Option("--expert", help="The same of each expert."),
        forms.FILES,
    ],
    merged: Annotated[
        str | Path | None,
        typer.Option(help="The same of the merge in full precision."),
        forms.PATH,
    ] = None,
    base: Annotated[
        str | Path | None, typer.Option(help="The same of the base."), forms.PATH
    ] = None,
    gptq: Annotated[
        str | Path | None, typer.Option(help="The same of the merge under plain GPTQ."), forms.PATH
    ] = None,
    task: Annotated[
        Mapping[str, str] | None,
        typer.Option(
            help="What each expert is for; default the task of its name, or the only one."
        ),
        forms.PAIRS,
    ] = None,
    metric: Annotated[
        Mapping[str, str] | None,
        typer.Option(help="The metric, where a task has several; default accuracy."),
        forms.PAIRS,
    ] = None,
    reporter: Reporter,
) -> RetentionResult:
    """Say how much of every expert a quantized merge has kept, from evaluations of all of them.

    Writes epmq_evaluation.json into DIR, where `report` and the model card find it.

    Raises:
        EPMQInputError: a file cannot be used, or models were not measured alike.
    """
    from ..publish.page.retention import retention_of, write_retention

    others = {"base": base, "merged": merged, "gptq": gptq}
    found, left = retention_of(
        folder,
        quantized=quantized,
        experts=experts,
        others={stage: file for stage, file in others.items() if file is not None},
        tasks=task,
        metrics=metric,
    )
    if left:
        reporter.note(f"not evaluated: {', '.join(left)}")
    return RetentionResult(found, write_retention(folder, found))
