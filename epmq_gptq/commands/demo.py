"""``demo``: the whole way, on small models that are trained here."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import EPMQInputError
from ..io.console import Reporter
from . import forms
from .operation import Result, operation
from .quantize import say_checkpoint

if TYPE_CHECKING:
    from ..evaluation.demo import DemoResult as Scores


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """What each method makes of the demo's merge.

    Attributes:
        out: folder of the E-PMQ checkpoint.
        scores: of every method on every domain.
    """

    out: Path
    scores: "Scores"

    def to_dict(self) -> dict[str, Any]:
        return self.scores.to_dict()

    def print_to(self, console: Console) -> None:
        from ..evaluation.demo.table import result_table

        console.print(result_table(self.scores))

    def show(self, reporter: Reporter) -> None:
        if reporter.quiet:  # otherwise it is part of what was said on the way
            self.print_to(reporter.result)
        say_checkpoint(reporter, self.out)

    def __repr__(self) -> str:
        return f"<DemoResult {self.out.name}>"


@operation(
    ("the whole way on an embedded example, in minutes on a CPU", "epmq-gptq demo"),
    ("only to see that everything runs", "epmq-gptq demo --quick --out /tmp/demo"),
    (
        "3 bits, of a TIES merge, in place of the run before",
        "epmq-gptq demo --bits 3 --method ties --overwrite",
    ),
)
def demo(
    *,
    out: Annotated[str | Path, forms.OUT, forms.PATH] = "demo-4bit",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, only to see that everything runs.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Bits of all methods.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights per scale.")] = 32,
    alpha: Annotated[
        float | None,
        typer.Option(help="Strength of E-PMQ's anchor to the merge; default: chosen by itself."),
    ] = None,
    method: Annotated[str, forms.METHOD] = "average",
    awq: Annotated[bool, typer.Option("--awq", help="Also GPTQModel's AWQ (minutes).")] = False,
    seed: Annotated[int, typer.Option(help="Of the models and the data.")] = 0,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again although models are cached.")
    ] = False,
    overwrite: Annotated[bool, forms.OVERWRITE] = False,
    reporter: Reporter,
) -> DemoResult:
    """Train small experts, merge and quantize them, and compare the methods. Needs no network.

    Raises:
        EPMQInputError: ``out`` is taken, or an option cannot be used.
    """
    for name, value in {"bits": bits, "group_size": group_size}.items():
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
        bits=bits,
        group_size=group_size,
        alpha=alpha,
        awq=awq,
        seed=seed,
        merge_method=method,
        quick=quick,
        retrain=retrain,
        overwrite=overwrite,
    )
    return DemoResult(out, run_demo(options, reporter.out, quiet=not reporter.verbose))
