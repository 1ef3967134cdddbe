"""``check``: which engines can serve a finished checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import ExitCode
from ..io.console import Reporter
from . import forms
from .operation import Result, operation

if TYPE_CHECKING:
    from ..checks.engines import ServingReport


@dataclass(frozen=True, repr=False)
class CheckResult(Result):
    """Which engines can serve a checkpoint.

    Attributes:
        serving: verdicts, reasons, and what was found in the files.
    """

    serving: "ServingReport"

    @property
    def ok(self) -> bool:
        """Whether it can be served."""
        return self.serving.is_served

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.OK if self.ok else ExitCode.INPUT

    def to_dict(self) -> dict[str, Any]:
        return self.serving.to_dict()

    def print_to(self, console: Console) -> None:
        from ..checks.engines.printing import print_serving

        print_serving(console, self.serving)

    def __repr__(self) -> str:
        return f"<CheckResult: {'served' if self.ok else 'not served'}>"


@operation(
    ("a checkpoint of ours, or of anybody's", "epmq-gptq check merged-4bit"),
    (
        "before it is served on four GPUs",
        "epmq-gptq check org/merged-4bit --engine vllm --tensor-parallel 4",
    ),
    interrupted="nothing was written.",
)
def check(
    checkpoint: Annotated[
        str | Path,
        typer.Argument(help="A finished GPTQ checkpoint, ours or any: folder or hub id."),
        forms.SOURCE,
    ],
    *,
    engines: Annotated[
        Sequence[str],
        typer.Option(
            "--engine",
            help="vLLM, SGLang, transformers, GPTQModel or TGI (archived). All but TGI where none "
            "is given.",
        ),
        forms.NAMES,
    ] = (),
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that shall share each layer.")] = 1,
    reporter: Reporter,
) -> CheckResult:
    """Say which engines can serve a finished checkpoint, and why not.

    What counts is what its tensors hold, not what its configuration says. Exits with 0 if every
    --engine can serve it (without any: if one can), with 2 if not or if it cannot be read.

    Raises:
        EPMQInputError: it cannot be read, or there is no such engine.
    """
    from ..checks.engines import check_checkpoint

    found = check_checkpoint(checkpoint, engines=engines, tensor_parallel=tensor_parallel)
    return CheckResult(found)
