"""From experts to a checkpoint: inspect, merge, quantize, requantize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..io.console import Reporter
from ..recipe import Recipe
from .session import Result, path_of, session

if TYPE_CHECKING:
    from ..checks import Preflight
    from ..commands.draft import Given
    from ..commands.pipeline import RunResult
    from ..merging import MergeResult
    from ..report import QuantizationReport


# ---- quantize ------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class QuantizeResult(Result):
    """A checkpoint and how it was made.

    Attributes:
        out: its folder.
        recipe: everything that was asked for.
        run: the report, module by module, and what became of every expert's rows.
    """

    out: Path
    recipe: Recipe
    run: RunResult

    @property
    def report(self):
        """The :class:`~epmq_gptq.QuantizationReport`."""
        return self.run.report

    def to_dict(self) -> dict[str, Any]:
        from ..commands.pipeline import run_document

        return run_document(self.recipe, self.out, self.run)

    def print_to(self, console: Console) -> None:
        from ..commands.summary import print_summary

        print_summary(console, self.run.report, self.run.rows)

    def __repr__(self) -> str:
        return f"<QuantizeResult {self.out.name}: {len(self.report.modules)} modules>"


def quantize(
    target: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    calibration: Any = None,
    experts: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizeResult:
    """Quantize a merged model towards its experts; ``epmq-gptq quantize``.

    Args:
        target: a recipe (file, mapping or ``Recipe``), or a merged model: folder or hub id.
        out: folder of the new checkpoint.
        calibration: of a merged model: expert → rows, or whatever says where they are (a file's
            name, a ``Path``, a dataset, a recipe's options, ``"data_free"``); or one source for all
            with ``expert_column``.
        experts: of a merged model: name → folder or hub id; adds to what the model says itself.
        base: of a merged model: what the experts were fine-tuned from.
        settings: options of ``EPMQConfig``; of a recipe they replace its own.
        dtype, seed: of a merged model: as in a recipe.
        batch_size: rows per forward pass, instead of the recipe's.
        device: "cpu" or "cuda"; None for a GPU where there is one.
        overwrite: replace what is in ``out``.
        resume: folder in which the run keeps what it needs to go on after a kill, and goes on from
            what is there.
        progress: say what is going on.

    Raises:
        EPMQInputError: something cannot be used as asked; nothing was computed.
        EPMQNumericalError: numbers that cannot be trusted; nothing was written.
        EPMQStopped: it was asked to stop (SIGINT, SIGTERM), and can go on from ``resume``.
    """
    with session(progress) as reporter:
        from ..commands.pipeline import RunOptions, quantize_recipe

        out = path_of(out)
        given = _given(experts, base, settings, dtype, seed)
        recipe = _recipe(target, given, calibration, reporter)
        resume = None if resume is None else path_of(resume)
        options = RunOptions(out, overwrite, device, batch_size, resume=resume)
        return QuantizeResult(out, recipe, quantize_recipe(recipe, options, reporter))


# ---- requantize ----------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RequantizeResult(Result):
    """A checkpoint that was made from recorded statistics.

    Attributes:
        out: its folder.
        report: module by module.
    """

    out: Path
    report: QuantizationReport

    def to_dict(self) -> dict[str, Any]:
        return {"checkpoint": self.out.name, "report": self.report.to_dict()}

    def print_to(self, console: Console) -> None:
        from ..commands.summary import print_summary

        print_summary(console, self.report, {})

    def __repr__(self) -> str:
        return f"<RequantizeResult {self.out.name}: {len(self.report.modules)} modules>"


def requantize(
    statistics: str | Path,
    *,
    out: str | Path,
    merged: str | Path | None = None,
    leave_out: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> RequantizeResult:
    """Quantize a merge anew from statistics that a run kept; ``epmq-gptq requantize``.

    Args:
        statistics: what ``save_statistics`` kept: its folder, or the checkpoint.
        out: folder of the new checkpoint.
        merged: the merged model; may be left out where the statistics are of one on the hub.
        leave_out: experts that shall not count.
        settings: options of ``EPMQConfig`` in place of the recorded ones.
        device: "cpu" or "cuda"; None for a GPU where there is one.
        dtype: that weights are computed in; None for that of the recorded run.
        overwrite: replace what is in ``out``.
        progress: say what is going on.

    Raises:
        EPMQInputError: an option cannot be changed, or merge and statistics do not belong together.
        EPMQNumericalError: numbers that cannot be trusted; nothing was written.
    """
    with session(progress) as reporter, reporter.quiet_host():
        from ..host.recorded.run import requantize_folder

        out = path_of(out)
        made = requantize_folder(
            path_of(statistics),
            out,
            reporter,
            merged=None if merged is None else str(merged),
            leave_out=leave_out,
            settings=settings,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
        )
        return RequantizeResult(out, made)


# ---- merge ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MergedModel(Result):
    """A merged model.

    Attributes:
        out: its folder.
        merge: method, parameters and record.
    """

    out: Path
    merge: MergeResult

    def to_dict(self) -> dict[str, Any]:
        return self.merge.to_dict()

    def print_to(self, console: Console) -> None:
        from ..commands.summary import columns
        from ..io.console import human_size

        merge = self.merge
        written = f"{human_size(merge.bytes)} in {merge.tensors} tensors"
        console.print(
            columns(
                [
                    ("method", merge.method),
                    *((f"  {name}", str(value)) for name, value in merge.parameters.items()),
                    *(("expert", name) for name in merge.record["experts"]),
                    ("merged", f"{self.out.name}: {written}"),
                ]
            )
        )

    def __repr__(self) -> str:
        return f"<MergedModel {self.out.name}: {self.merge.method}>"


def merge(
    method: str,
    *,
    experts: Mapping[str, str | Path],
    out: str | Path,
    base: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    calibration: Any = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> MergedModel:
    """Merge experts of one base into a new model; ``epmq-gptq merge``.

    Args:
        method: one of :func:`methods`.
        experts: name → folder or hub id.
        out: folder of the new model.
        base: folder or hub id the experts were fine-tuned from.
        parameters: options of the method.
        calibration: of a method that needs it: as in :func:`quantize`.
        batch_size, seed: of the calibration.
        device: where the arithmetic runs.
        overwrite: replace what is in ``out``.
        progress: say what is going on.

    Raises:
        EPMQInputError: a method, option or model cannot be used as asked.
    """
    with session(progress) as reporter:
        from ..commands.pipeline import check_free, merge_with_progress

        out = path_of(out)
        with reporter.quiet_host():
            check_free(out, overwrite=overwrite)
            result = merge_with_progress(
                reporter,
                method,
                base=None if base is None else str(base),
                experts={name: str(spec) for name, spec in experts.items()},
                out=out,
                parameters=dict(parameters or {}),
                overwrite=overwrite,
                device=device,
                calibration=calibration,
                batch_size=batch_size,
                seed=seed,
            )
        return MergedModel(out, result)


class MergeMethods(Result, dict):
    """Name → what :func:`epmq_gptq.merging.merge_methods` says of a method."""

    def to_dict(self) -> dict[str, Any]:
        return {"methods": dict(self)}

    def print_to(self, console: Console) -> None:
        from ..commands.summary import methods_table

        console.print(methods_table(self))


def methods() -> MergeMethods:
    """The merge methods, their papers and their parameters; ``epmq-gptq methods``."""
    from ..merging import merge_methods

    return MergeMethods(merge_methods())


# ---- inspect -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class InspectResult(Result):
    """What was found before a run.

    Attributes:
        preflight: findings, similarities, coverage, estimates, engines.
    """

    preflight: Preflight

    @property
    def ok(self) -> bool:
        """Whether a run can succeed: the command would leave with 0."""
        return not self.preflight.errors

    def to_dict(self) -> dict[str, Any]:
        return self.preflight.to_dict()

    def print_to(self, console: Console) -> None:
        from ..checks.table import print_preflight

        print_preflight(console, self.preflight)

    def __repr__(self) -> str:
        found = self.preflight
        return f"<InspectResult: {len(found.errors)} errors, {len(found.warnings)} warnings>"


def inspect(
    target: str | Path | Mapping[str, Any] | Recipe,
    *,
    verify: str = "sample",
    calibration: Any = None,
    experts: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: bool = False,
) -> InspectResult:
    """Say what is wrong with the inputs of a run, and what it would cost; ``epmq-gptq inspect``.

    Args:
        target, calibration, experts, base, settings, device: as in :func:`quantize`.
        verify: "headers", "sample" or "full": how much of the weights is read.
        progress: say what is going on.

    Raises:
        EPMQInputError: the target cannot be read. What is wrong with a run is in the result.
    """
    with session(progress) as reporter, reporter.quiet_host():
        from ..commands.inspection import Subject
        from ..commands.inspection import inspect as inspect_subject

        given = _given(experts, base, settings, None, None)
        read = _read(target, given, calibration, reporter)
        subject = Subject.of_recipe(read) if isinstance(read, Recipe) else Subject.of_draft(read)
        return InspectResult(inspect_subject(subject, verify=verify, device=device))


# ---- what a call means ---------------------------------------------------------------------------


def _given(
    experts: Mapping[str, str | Path] | None,
    base: str | Path | None,
    settings: Mapping[str, Any] | None,
    dtype: str | None,
    seed: int | None,
) -> Given:
    from ..commands.draft import Given

    return Given(
        experts={name: str(spec) for name, spec in (experts or {}).items()},
        base=None if base is None else str(base),
        quantize=dict(settings or {}),
        dtype=dtype,
        seed=seed,
    )


def _recipe(target: Any, given: Given, calibration: Any, reporter: Reporter) -> Recipe:
    """The recipe that runs."""
    read = _read(target, given, calibration, reporter)
    if isinstance(read, Recipe):
        return read
    recipe = read.recipe()
    with reporter.quiet_host():
        read.check_weights(lambda what: reporter.step("verify", what))
    return recipe


def _read(target: Any, given: Given, calibration: Any, reporter: Reporter):
    """A recipe, or the draft of one where the target is a merged model."""
    import dataclasses

    from ..commands.targets import is_recipe, read_merge, refuse_given

    if isinstance(target, (Recipe, Mapping)) or is_recipe(str(target)):
        refuse_given(
            dataclasses.replace(
                given, quantize={}, calibration=() if calibration is None else ("given",)
            )
        )
        recipe = _given_recipe(target)
        recipe.quantize = {**recipe.quantize, **given.quantize}
        return recipe
    draft = read_merge(str(target), given, reporter)
    if calibration is not None:
        draft.calibration = _block(calibration)
    return draft


def _given_recipe(target: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    if isinstance(target, Recipe):
        import copy

        return copy.copy(target)
    if not isinstance(target, Mapping):
        return Recipe.from_file(path_of(target))
    options = dict(target)
    if "calibration" in options:
        options["calibration"] = _block(options["calibration"])
    return Recipe.from_options(options, Path.cwd())


def _block(calibration: Any) -> Any:
    """A calibration as Python has it, as the block of a recipe; files relative to where we are."""
    from ..calibration.sources import given_sources, is_data_free

    if not isinstance(calibration, Mapping) or "expert_column" in calibration:
        return calibration
    return {
        name: value if is_data_free(value) else given_sources(value, name)
        for name, value in calibration.items()
    }
