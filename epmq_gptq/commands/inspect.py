"""``inspect``: what is wrong with the inputs of a run, and what it would cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..errors import ExitCode
from ..io.console import Reporter
from . import forms
from .operation import Form, Result, operation

if TYPE_CHECKING:
    from ..checks import Preflight
    from ..recipe import Recipe


@dataclass(frozen=True, repr=False)
class InspectResult(Result):
    """What was found before a run.

    Attributes:
        preflight: findings, similarities, coverage, estimates, engines.
    """

    preflight: "Preflight"

    @property
    def ok(self) -> bool:
        """Whether a run can succeed."""
        return not self.preflight.errors

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.OK if self.ok else ExitCode.INPUT

    def to_dict(self) -> dict[str, Any]:
        return self.preflight.to_dict()

    def print_to(self, console: Console) -> None:
        from ..checks.table import print_preflight

        print_preflight(console, self.preflight)

    def __repr__(self) -> str:
        found = self.preflight
        return f"<InspectResult: {len(found.errors)} errors, {len(found.warnings)} warnings>"


@operation(
    ("everything that a run of this recipe would use", "epmq-gptq inspect recipe.yaml"),
    (
        "a merged model that says itself what it was made of, without its weights",
        "epmq-gptq inspect org/merged-7b --verify headers",
    ),
    (
        "would 3 bits in groups of 64 be served?",
        "epmq-gptq inspect recipe.yaml --set bits=3 --set group_size=64",
    ),
    (
        "in a script: 2 if a run cannot succeed, and why",
        "epmq-gptq inspect recipe.yaml --json - | jq '.findings[] | [.code, .cause]'",
    ),
)
def inspect(
    target: Annotated[
        "str | Path | Mapping[str, Any] | Recipe",
        typer.Argument(help="A recipe (YAML file), or a merged model: folder or hub id."),
        forms.TARGET,
    ],
    *,
    verify: Annotated[
        str,
        typer.Option(
            help="headers: no weights; sample: up to 32 MB of each model; full: all weights, and "
            "NaN and infinities are counted."
        ),
        Form(Literal["headers", "sample", "full"]),
    ] = "sample",
    calibration: Annotated[
        Any, typer.Option(help="Of a merged model: as of `quantize`."), forms.CALIBRATION
    ] = None,
    experts: Annotated[Mapping[str, str | Path] | None, forms.EXPERTS, forms.PAIRS] = None,
    base: Annotated[str | Path | None, forms.BASE, forms.SOURCE] = None,
    settings: Annotated[Mapping[str, Any] | None, forms.SETTINGS_OPTION, forms.VALUES] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="That the run would take: for the estimate of its time.",
            autocompletion=forms.one_of("cpu", "cuda"),
        ),
    ] = None,
    reporter: Reporter,
) -> InspectResult:
    """Say what is wrong with the inputs of a run, and what it would cost, without running it.

    Exits with 2 where a run cannot succeed.

    Raises:
        EPMQInputError: the target cannot be read. What is wrong with a run is in the result.
    """
    from ..recipe import Recipe
    from .draft import Given, read_target
    from .inspection import Subject
    from .inspection import inspect as inspect_subject

    given = Given(experts or {}, base, calibration, settings or {})
    read = read_target(target, given, reporter)
    subject = Subject.of_recipe(read) if isinstance(read, Recipe) else Subject.of_draft(read)
    return InspectResult(inspect_subject(subject, verify=verify, device=device))
