"""The commands as functions, for notebooks and scripts: the same names, the same options.

    import epmq_gptq

    result = epmq_gptq.quantize(
        "./merged",
        out="merged-4bit",
        experts={"math": "./math-expert", "code": "./code-expert"},
        calibration={"math": math_rows, "code": "code.jsonl"},
        settings={"bits": 4, "group_size": 128},
        progress=True,
    )
    result            # in a notebook: its table
    result.to_dict()  # what `--json` writes

Every function raises an :class:`~epmq_gptq.errors.EPMQError` where its command would leave with a
code, warns with :class:`~epmq_gptq.errors.EPMQWarning`, never asks anything, and prints nothing
unless ``progress`` is True. A new one takes its arguments, works inside :func:`_session` and
returns a subclass of :class:`Result`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .console import Reporter
from .errors import EPMQError, EPMQWarning
from .options import resolve_path
from .recipe import Recipe

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .lineage import Given
    from .merging import MergeResult
    from .pipeline import RunResult
    from .preflight import Preflight
    from .regret import Retention

__all__ = [
    "EvaluateResult",
    "ExplainResult",
    "InspectResult",
    "MergeMethods",
    "MergedModel",
    "QuantizeResult",
    "ReportResult",
    "Result",
    "RetentionResult",
    "evaluate",
    "explain",
    "inspect",
    "merge",
    "methods",
    "quantize",
    "report",
    "retention",
]

# Of a table in a notebook, whose cells scroll; `str()` of a result has it, too.
_WIDTH = 160
# Colours and lines of rich; the notebook keeps its own background, light or dark.
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2">{code}</pre>'


class Result:
    """What a function of this module returns.

    A notebook shows its table; ``str()`` is the same as plain text.
    """

    def to_dict(self) -> dict[str, Any]:
        """What the command writes with ``--json``, as plain data."""
        raise NotImplementedError

    def print_to(self, console: Console) -> None:
        """Print the tables that the command shows."""
        raise NotImplementedError

    def _recorded(self) -> Console:
        # force_jupyter: rich would otherwise display it right now.
        console = Console(
            file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True
        )
        self.print_to(console)
        return console

    def _repr_html_(self) -> str:
        return self._recorded().export_html(code_format=_HTML, inline_styles=True)

    def __str__(self) -> str:
        return self._recorded().export_text()


@contextlib.contextmanager
def _session(progress: bool) -> Iterator[Reporter]:
    """The host is quiet and heard, our own warnings are Python's, in the caller's line."""
    reporter = Reporter(quiet=not progress)
    own: dict[str, EPMQWarning] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EPMQWarning)
            try:
                yield reporter
            finally:
                own = {
                    str(each.message): each.message
                    for each in caught
                    if isinstance(each.message, EPMQWarning)
                }
    finally:
        for warning in own.values():
            # 1 is this line, 2 contextlib's, 3 the function of this module, 4 who called it.
            warnings.warn(warning, stacklevel=4)


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
        from .pipeline import run_document

        return run_document(self.recipe, self.out, self.run)

    def print_to(self, console: Console) -> None:
        from .summary import print_summary

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
        progress: say what is going on.

    Raises:
        EPMQInputError: something cannot be used as asked; nothing was computed.
        EPMQNumericalError: numbers that cannot be trusted; nothing was written.
    """
    with _session(progress) as reporter:
        from .pipeline import RunOptions, quantize_recipe

        out = _path(out)
        given = _given(experts, base, settings, dtype, seed)
        recipe = _recipe(target, given, calibration, reporter)
        options = RunOptions(out, overwrite, device, batch_size)
        return QuantizeResult(out, recipe, quantize_recipe(recipe, options, reporter))


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
        from .summary import columns, human_size

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
    with _session(progress) as reporter:
        from .pipeline import check_free, merge_with_progress

        out = _path(out)
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
        from .summary import methods_table

        console.print(methods_table(self))


def methods() -> MergeMethods:
    """The merge methods, their papers and their parameters; ``epmq-gptq methods``."""
    from .merging import merge_methods

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
        from .preflight.table import print_preflight

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
    with _session(progress) as reporter, reporter.quiet_host():
        from .preflight.inspection import Subject
        from .preflight.inspection import inspect as inspect_subject

        given = _given(experts, base, settings, None, None)
        read = _read(target, given, calibration, reporter)
        subject = Subject.of_recipe(read) if isinstance(read, Recipe) else Subject.of_draft(read)
        return InspectResult(inspect_subject(subject, verify=verify, device=device))


# ---- evaluate ------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """Figures of one model.

    Attributes:
        evaluations: one per suite, or one of lm-eval.
    """

    evaluations: list[Evaluation] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        from .evaluation.results import evaluation_document

        return evaluation_document(self.evaluations)

    def print_to(self, console: Console) -> None:
        from .evaluation.results import table_of

        for each in self.evaluations:
            console.print(table_of(each))

    def __repr__(self) -> str:
        return f"<EvaluateResult: {', '.join(each.harness for each in self.evaluations)}>"


def evaluate(
    model: str | Path,
    *,
    suite: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    progress: bool = False,
    **options: Any,
) -> EvaluateResult:
    """Evaluate a model on suites of this package, or on tasks of lm-eval; ``epmq-gptq evaluate``.

    Args:
        model: folder or hub id: full precision, GPTQ or AWQ.
        suite: "vision8", "text4" or "seq2seq4", or several of them.
        tasks: of lm-eval; with one suite, the tasks of it to run.
        progress: say what is going on.
        options: the other fields of :class:`~epmq_gptq.evaluation.request.EvaluationRequest`, which
            are the options of the command: ``limit``, ``batch_size``, ``split``, ``device``, …

    Raises:
        EPMQInputError: there is no such suite, task or option, or the model cannot be loaded.
    """
    with _session(progress) as reporter:
        from .evaluation.request import EvaluationRequest, run_request
        from .options import check_keys

        known = [name for name in EvaluationRequest.__dataclass_fields__ if name != "suites"]
        check_keys(options, known, "`evaluate`")
        if options.get("include_path") is not None:
            options["include_path"] = _path(options["include_path"])
        request = EvaluationRequest(suites=_names(suite), tasks=_names(tasks), **options)
        with reporter.quiet_host():
            return EvaluateResult(run_request(str(model), request, reporter))


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


# ---- explain -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ExplainResult(Result):
    """What an error code means.

    Attributes:
        entry: ``code``, ``title``, ``means``, ``cause``, ``remedy``, ``example``.
    """

    entry: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entry)

    def print_to(self, console: Console) -> None:
        from .explanations import entry_table

        console.print(entry_table(self.entry))

    def __repr__(self) -> str:
        return f"<ExplainResult {self.entry['code']}: {self.entry['title']}>"


def explain(code: str | EPMQError) -> ExplainResult:
    """What an error code means, why it comes and what to do; ``epmq-gptq explain``.

    Args:
        code: such as "EPMQ-F30" or "F30", or the error itself.

    Raises:
        EPMQInputError: there is no such code.
    """
    from .explanations import as_dict

    return ExplainResult(as_dict(code.code if isinstance(code, EPMQError) else code))


# ---- report and retention ------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ReportResult(Result):
    """What a run did to each expert.

    Attributes:
        figures: see :func:`epmq_gptq.regret.report_figures`.
        out: file of the page, None where none was written.
    """

    figures: dict[str, Any]
    out: Path | None = None

    @property
    def page(self) -> str:
        """The page: one HTML document that needs no network."""
        from .regret.page import page_of

        return page_of(self.figures)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.figures)

    def print_to(self, console: Console) -> None:
        from .regret.table import expert_table

        console.print(expert_table(self.figures))

    def __repr__(self) -> str:
        run = self.figures["run"]
        return f"<ReportResult {run['checkpoint']}: {len(self.figures['experts'])} experts>"


def report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    baseline: str | Path | None = None,
    evaluation: str | Path | None = None,
    overwrite: bool = False,
) -> ReportResult:
    """What a run did to each expert, module by module; ``epmq-gptq report``.

    Args:
        folder: of the quantized checkpoint.
        out: file of the page, ending in .html; None writes none.
        baseline: folder of the same merge under plain GPTQ (``profile="gptq"``).
        evaluation: file of :func:`retention`; None for the one in ``folder``, if there.
        overwrite: replace a page.

    Raises:
        EPMQInputError: there is no report, what was given belongs to another model, or the place
            is taken.
    """
    from .regret.sources import Sources, check_page

    given = [None if one is None else _path(one) for one in (folder, baseline, evaluation)]
    sources = Sources.read(*given)
    page = None if out is None else _path(out)
    if page is not None:
        check_page(page, [one for one in given if one is not None], overwrite)
    result = ReportResult(sources.figures(), page)
    if page is not None:
        from .output import write_whole

        write_whole(page, result.page)
    return result


@dataclass(frozen=True, repr=False)
class RetentionResult(Result):
    """How much of every expert is kept.

    Attributes:
        retention: the figures.
        out: the file that they were written to.
    """

    retention: Retention
    out: Path

    def to_dict(self) -> dict[str, Any]:
        return self.retention.to_dict()

    def print_to(self, console: Console) -> None:
        from .regret.table import retention_table

        console.print(retention_table(self.retention))

    def __repr__(self) -> str:
        return f"<RetentionResult: {len(self.retention.experts)} experts>"


def retention(
    folder: str | Path,
    *,
    quantized: str | Path,
    experts: Mapping[str, str | Path],
    merged: str | Path | None = None,
    base: str | Path | None = None,
    gptq: str | Path | None = None,
    task: Mapping[str, str] | None = None,
    metric: Mapping[str, str] | None = None,
) -> RetentionResult:
    """How much of every expert a quantized merge has kept; ``epmq-gptq retention``.

    Writes ``epmq_evaluation.json`` into ``folder``, where :func:`report` and the card find it.

    Args:
        folder: of the quantized checkpoint.
        quantized, merged, base, gptq: files of ``epmq-gptq evaluate --json`` about these models.
        experts: name → the same about that expert.
        task, metric: name → what that expert is for, and how it is measured, where it is not clear.

    Raises:
        EPMQInputError: a file cannot be used, or models were not measured alike.
    """
    from .regret.retention import retention_of, write_retention

    place = _path(folder)
    others = {"base": base, "merged": merged, "gptq": gptq}
    found, _ = retention_of(
        place,
        quantized=_path(quantized),
        experts={name: _path(file) for name, file in experts.items()},
        others={stage: _path(file) for stage, file in others.items() if file is not None},
        tasks=task,
        metrics=metric,
    )
    return RetentionResult(found, write_retention(place, found))


# ---- what a call means ---------------------------------------------------------------------------


def _path(place: str | Path) -> Path:
    return resolve_path(str(place), Path())


def _given(
    experts: Mapping[str, str | Path] | None,
    base: str | Path | None,
    settings: Mapping[str, Any] | None,
    dtype: str | None,
    seed: int | None,
) -> Given:
    from .lineage import Given

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

    from .targets import is_recipe, read_merge, refuse_given

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
        return Recipe.from_file(_path(target))
    options = dict(target)
    if "calibration" in options:
        options["calibration"] = _block(options["calibration"])
    return Recipe.from_options(options, Path.cwd())


def _block(calibration: Any) -> Any:
    """A calibration as Python has it, as the block of a recipe; files relative to where we are."""
    from .calibration_names import given_sources
    from .rows import is_data_free

    if not isinstance(calibration, Mapping) or "expert_column" in calibration:
        return calibration
    return {
        name: value if is_data_free(value) else given_sources(value, name)
        for name, value in calibration.items()
    }
