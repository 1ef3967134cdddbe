"""``quantize``: a merged model, or a recipe, towards its experts."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import EPMQInputError
from ..io.console import Reporter, human_size
from . import forms
from .operation import Result, operation

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..run_report import QuantizationReport
    from .run_recipe import RunResult


@dataclass(frozen=True, repr=False)
class QuantizeResult(Result):
    """A checkpoint and how it was made.

    Attributes:
        out: its folder.
        recipe: everything that was asked for.
        run: the report, module by module, and what became of every expert's rows.
        host_warnings: what GPTQModel warned of on the way.
        full: whether the table has a line for every layer, however many.
        resume: the folder to go on from, which is not needed any more.
    """

    out: Path
    recipe: "Recipe"
    run: "RunResult"
    host_warnings: tuple[str, ...] = ()
    full: bool = False
    resume: Path | None = None

    @property
    def report(self) -> "QuantizationReport":
        """Module by module."""
        return self.run.report

    def to_dict(self) -> dict[str, Any]:
        from .run_recipe import run_document

        document = run_document(self.recipe, self.out, self.run)
        return document | {"host_warnings": list(self.host_warnings)}

    def print_to(self, console: Console) -> None:
        from .summary import print_summary

        print_summary(console, self.report, self.run.rows, full=self.full)

    def show(self, reporter: Reporter) -> None:
        self.print_to(reporter.out)
        say_checkpoint(reporter, self.out)
        if self.resume is not None:
            reporter.note(f"{self.resume} is no longer needed: the checkpoint stands.")

    def __repr__(self) -> str:
        return f"<QuantizeResult {self.out.name}: {len(self.report.modules)} modules>"


@dataclass(frozen=True, repr=False)
class WrittenRecipe(Result):
    """A recipe that was written down, perhaps with gaps.

    Attributes:
        file: of the recipe.
        uncalibrated: the experts whose calibration is to be filled in.
    """

    file: Path
    uncalibrated: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.file.name, "uncalibrated": self.uncalibrated}

    def print_to(self, console: Console) -> None:
        gaps = f"; to be filled in: {', '.join(self.uncalibrated)}" if self.uncalibrated else ""
        line = f"{'recipe':<12}{self.file}{gaps}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, reporter: Reporter) -> None:
        self.print_to(reporter.out)

    def __repr__(self) -> str:
        return f"<WrittenRecipe {self.file.name}>"


def say_checkpoint(reporter: Reporter, out: Path) -> None:
    """The size of what was written, and that the host gave warnings."""
    from .summary import folder_size

    size, files = folder_size(out)
    reporter.step("checkpoint", f"{out}: {human_size(size)} in {files} files")
    if reporter.host.alarms:
        count = len(reporter.host.alarms)
        reporter.note(f"GPTQModel gave {count} warnings on the way; --verbose shows them.")


@operation(
    (
        "everything in one file; after a kill the same command goes on where it was",
        "epmq-gptq quantize recipe.yaml --out merged-4bit --resume unfinished",
    ),
    (
        "a merged model that says itself what it was made of",
        "epmq-gptq quantize org/merged-7b --out merged-4bit \\\n"
        "    --calibration math=math.jsonl --calibration code=code.txt",
    ),
    (
        "the paper's algorithm at 3 bits",
        "epmq-gptq quantize ./merged --out merged-3bit \\\n"
        "    --set bits=3 --set profile=paper \\\n"
        "    --calibration '{file: mix.parquet, expert_column: task}'",
    ),
    (
        "write down what is known, to fill in the rest by hand",
        "epmq-gptq quantize ./merged --write-recipe recipe.yaml",
    ),
)
def quantize(
    target: Annotated[
        "str | Path | Mapping[str, Any] | Recipe",
        typer.Argument(
            help="A recipe (YAML file; its keys are below), or a merged model: folder or hub id."
        ),
        forms.TARGET,
    ],
    *,
    out: Annotated[str | Path | None, forms.OUT, forms.PATH] = None,
    calibration: Annotated[
        Any, typer.Option(help="Of a merged model: rows of each expert."), forms.CALIBRATION
    ] = None,
    experts: Annotated[Mapping[str, str | Path] | None, forms.EXPERTS, forms.PAIRS] = None,
    base: Annotated[str | Path | None, forms.BASE, forms.SOURCE] = None,
    settings: Annotated[Mapping[str, Any] | None, forms.SETTINGS_OPTION, forms.VALUES] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a merged model: `dtype` of a recipe."), forms.DTYPE
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a merged model: `seed` of a recipe.")] = None,
    write_recipe: Annotated[
        str | Path | None,
        typer.Option(help="Of a merged model: write what is known as a recipe, and stop."),
        forms.PATH,
    ] = None,
    overwrite: Annotated[bool, forms.OVERWRITE] = False,
    device: Annotated[str | None, forms.DEVICE] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per forward pass, instead of the recipe's.")
    ] = None,
    resume: Annotated[
        str | Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep in this folder what it takes to go on after a kill, and go on from what an "
            "earlier attempt left there. Ctrl-C then stops at the end of a layer.",
        ),
        forms.PATH,
    ] = None,
    profile: Annotated[
        str | Path | None,
        typer.Option(
            help="Write seconds per phase and peak memory to this file, as JSON; on a GPU each "
            "phase is waited for, which takes a little time."
        ),
        forms.PATH,
    ] = None,
    full: Annotated[bool, forms.FULL] = False,
    reporter: Reporter,
) -> QuantizeResult | WrittenRecipe:
    """Quantize a merged model towards its experts.

    By a recipe, or a merged model that says itself what it was made of (mergekit's configuration, a
    model card).

    Raises:
        EPMQInputError: something cannot be used as asked; nothing was computed.
        EPMQNumericalError: numbers that cannot be trusted; nothing was written.
        EPMQStopped: it was asked to stop (SIGINT, SIGTERM), and can go on from ``resume``.
    """
    from .draft import Given, complete_recipe

    if profile is not None:
        forms.check_file(profile, "--profile")
    given = Given(experts or {}, base, calibration, settings or {}, dtype, seed)
    if write_recipe is not None:
        return _written_recipe(target, given, write_recipe, overwrite, reporter)
    if out is None:
        raise EPMQInputError(
            "`--out` is missing: the folder of the new checkpoint.",
            code="EPMQ-O01",
            subject="`--out`",
            remedy="Give a folder that is new or empty.",
        )
    from ..io.phases import exact_phases
    from . import run_recipe

    recipe = complete_recipe(target, given, reporter)
    options = run_recipe.RunOptions(out, overwrite, device, batch_size, resume)
    with contextlib.nullcontext() if profile is None else exact_phases():
        result = run_recipe.run(recipe, options, reporter)
    if profile is not None:
        profile.write_text(json.dumps(result.report.profile(), indent=2) + "\n", "utf-8")
        reporter.step("profile", str(profile))
    return QuantizeResult(out, recipe, result, tuple(reporter.host.alarms), full, resume)


def _written_recipe(
    target: Any, given: Any, file: Path, overwrite: bool, reporter: Reporter
) -> WrittenRecipe:
    from .draft import is_recipe, of_merged_model, read_merge

    option = "--write-recipe"
    if is_recipe(target):
        raise of_merged_model(option, "Copy the recipe.")
    forms.check_file(file, option)
    if file.exists() and not overwrite:
        raise EPMQInputError(
            f"`{option}`: `{file.name}` exists.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another name or pass --overwrite.",
        )
    draft = read_merge(str(target), given, reporter)
    file.write_text(draft.to_yaml(file.absolute().parent), encoding="utf-8")
    return WrittenRecipe(file, draft.uncalibrated)
