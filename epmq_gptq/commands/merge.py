"""``merge`` and ``methods``: experts of one base into a new model, and the ways to do it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..io.console import Reporter, human_size
from . import forms
from .operation import Result, operation

if TYPE_CHECKING:
    from ..merging import MergeResult


@dataclass(frozen=True, repr=False)
class MergedModel(Result):
    """A merged model.

    Attributes:
        out: its folder.
        merge: method, parameters and record.
    """

    out: Path
    merge: "MergeResult"

    @property
    def _size(self) -> str:
        return f"{human_size(self.merge.bytes)} in {self.merge.tensors} tensors"

    def to_dict(self) -> dict[str, Any]:
        return self.merge.to_dict()

    def print_to(self, console: Console) -> None:
        from .summary import columns

        lines = [
            ("method", self.merge.method),
            *((f"  {name}", str(value)) for name, value in self.merge.parameters.items()),
            *(("expert", name) for name in self.merge.record["experts"]),
            ("merged", f"{self.out.name}: {self._size}"),
        ]
        console.print(columns(lines))

    def show(self, reporter: Reporter) -> None:
        reporter.step("merged", f"{self.out}: {self._size}")

    def __repr__(self) -> str:
        return f"<MergedModel {self.out.name}: {self.merge.method}>"


@operation(
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
    method: Annotated[str, forms.METHOD],
    *,
    experts: Annotated[
        Mapping[str, str | Path],
        typer.Option("--expert", help="The experts, each a folder or org/model@revision."),
        forms.PAIRS,
    ],
    out: Annotated[str | Path, typer.Option("--out", help="Folder of the new model."), forms.PATH],
    base: Annotated[
        str | Path | None,
        typer.Option(help="Folder or hub id the experts were fine-tuned from."),
        forms.SOURCE,
    ] = None,
    parameters: Annotated[
        Mapping[str, Any] | None,
        typer.Option("--param", help="Options of the method."),
        forms.VALUES,
    ] = None,
    calibration: Annotated[
        Any,
        typer.Option(help="Of a method that needs calibration: rows of each expert."),
        forms.CALIBRATION,
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Calibration rows per forward pass.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the drawing of calibration rows.")] = 0,
    device: Annotated[
        str,
        typer.Option(
            help="Where the arithmetic runs: cpu or cuda.",
            autocompletion=forms.one_of("cpu", "cuda"),
        ),
    ] = "cpu",
    overwrite: Annotated[bool, forms.OVERWRITE] = False,
    reporter: Reporter,
) -> MergedModel:
    """Merge experts of one base into a new model.

    Raises:
        EPMQInputError: a method, option or model cannot be used as asked.
    """
    from .run_paths import check_free
    from .run_recipe import merge_with_progress

    check_free(out, overwrite=overwrite)
    result = merge_with_progress(
        reporter,
        method,
        base=base,
        experts=experts,
        out=out,
        parameters=parameters or {},
        overwrite=overwrite,
        device=device,
        calibration=_checked(calibration, list(experts)),
        batch_size=batch_size,
        seed=seed,
    )
    return MergedModel(out, result)


def _checked(calibration: Any, experts: list[str]) -> Any:
    """The calibration in the form that a recipe holds; batches that are made already stay so."""
    from ..calibration.arguments import check_experts_of
    from ..calibration.sources import recipe_calibration

    if not isinstance(calibration, Mapping):
        return calibration
    check_experts_of(calibration, experts)
    return recipe_calibration(calibration, experts)


class MergeMethods(Result, dict):
    """Name → what :func:`epmq_gptq.merging.merge_methods` says of a method."""

    def to_dict(self) -> dict[str, Any]:
        return {"methods": dict(self)}

    def print_to(self, console: Console) -> None:
        from .summary import methods_table

        console.print(methods_table(self))


@operation(
    ("all of them, with their papers and parameters", "epmq-gptq methods"),
    ("their names alone", "epmq-gptq methods --json - | jq '.methods | keys'"),
)
def methods(*, reporter: Reporter) -> MergeMethods:
    """List the merge methods, their papers and their parameters."""
    from ..merging import merge_methods

    return MergeMethods(merge_methods())
