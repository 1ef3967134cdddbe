"""``evaluate``: a model on tasks of lm-eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter
from . import forms
from .operation import Form, Result, operation

if TYPE_CHECKING:
    from ..evaluation import Evaluation


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """Figures of one model.

    Attributes:
        evaluation: every figure, with what decided it.
    """

    evaluation: "Evaluation"

    def to_dict(self) -> dict[str, Any]:
        from ..evaluation.results import evaluation_document

        return evaluation_document([self.evaluation])

    def print_to(self, console: Console) -> None:
        from ..evaluation.results import table_of

        console.print(table_of(self.evaluation))

    def __repr__(self) -> str:
        return f"<EvaluateResult: {self.evaluation.harness}>"


@operation(
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
        str | Path,
        typer.Argument(help="Folder or hub id org/name@revision: full precision, GPTQ or AWQ."),
        forms.SOURCE,
    ],
    tasks: Annotated[
        str | Sequence[str],
        typer.Option(help="Tasks of lm-eval, such as hellaswag,gsm8k."),
        forms.LISTED,
    ] = (),
    *,
    limit: Annotated[
        float | None, typer.Option(help="The first items of each task, or a share below 1.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Shots; default what each task says.")
    ] = None,
    batch_size: Annotated[
        int | str,
        typer.Option(help="Items per forward pass; `auto` for what fits on a GPU."),
        Form(str),
    ] = 1,
    include_path: Annotated[
        str | Path | None, typer.Option(help="Folder with YAML files of own tasks."), forms.PATH
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Through the chat template.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Run code that the model wrote (HumanEval)."
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
        typer.Option(help="float32, bfloat16 or float16; default float32 on a CPU."),
        forms.DTYPE,
    ] = None,
    device: Annotated[str | None, forms.DEVICE] = None,
    reporter: Reporter,
) -> EvaluateResult:
    """Evaluate a model, quantized or not, on any task of lm-eval.

    Raises:
        EPMQInputError: there is no such task, an option has a wrong value, or the model cannot be
            loaded.
    """
    from ..evaluation import TaskOptions, evaluate_model

    options = TaskOptions(
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        seed=seed,
    )
    result = evaluate_model(
        model,
        tasks,
        options,
        include_path=include_path,
        kernel=kernel,
        dtype=dtype,
        device=device,
        say=reporter.step,
    )
    return EvaluateResult(result)
