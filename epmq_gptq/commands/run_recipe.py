"""Run a recipe: read rows, merge, load, quantize, save.

What can be refused is refused in the order of what it costs to find out: options, places and rows
first, the merge next, the model last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.draws import RowSet, read_calibration
from ..calibration.encoded import EncodedCalibration, RowCounts
from ..calibration.rows import RowForm, form_of
from ..errors import EPMQInputError
from ..host import loading
from ..io.console import Reporter, StepProgress
from ..io.yaml_files import resolve_path
from ..merging.lineage.facts import plain, published
from ..recipe import Recipe
from .run_paths import check_free, check_places, pinned

if TYPE_CHECKING:
    from ..experts.linears import Linear
    from ..run_report import QuantizationReport


@dataclass(frozen=True)
class RunOptions:
    """What a shell decides about a run, not the recipe.

    Attributes:
        out: folder of the checkpoint.
        overwrite: replace what is there.
        device: "cpu", "cuda", "cuda:1"; None for a GPU where there is one.
        batch_size: instead of the recipe's.
        resume: folder in which the run keeps what it needs to go on after a kill, and goes on from
            what is there.
    """

    out: Path
    overwrite: bool = False
    device: str | None = None
    batch_size: int | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        report: module by module.
        rows: what became of every expert's calibration rows.
    """

    report: QuantizationReport
    rows: dict[str, RowCounts]


def run(recipe: Recipe, options: RunOptions, reporter: Reporter) -> RunResult:
    """Run a recipe.

    Raises:
        EPMQInputError: an option, folder or row cannot be used as asked.
        EPMQNumericalError: numbers that cannot be trusted, see ``EPMQConfig.on_bad_module``.
        EPMQStopped: it was asked to stop, and can go on from ``options.resume``.
    """
    out = resolve_path(str(options.out), Path()).absolute()
    check_free(out, overwrite=options.overwrite)
    if options.batch_size is not None and options.batch_size < 1:
        raise EPMQInputError(
            f"`--batch-size` should be positive, got {options.batch_size}.",
            code="EPMQ-O01",
            subject="`--batch-size`",
            remedy="Leave it out for the recipe's.",
        )
    # It goes into a JSON file at the end of the run, which may be published.
    lineage = published(plain(recipe.lineage, "`lineage`"))
    device = loading.choose_device(options.device)
    check_method(recipe)
    recipe = pinned(recipe, reporter)
    resume = None if options.resume is None else options.resume.absolute()
    check_places(recipe, out, options.overwrite, resume)
    for source in recipe.row_sources:
        if source.dataset is not None:
            reporter.step("fetch", f"dataset {source.label}")
    sets = recipe_rows(recipe)
    reporter.step("rows", _described_rows(sets))
    config = recipe.config()
    with (
        contextlib.closing(config),
        _merged_folder(recipe, out, options, device, reporter) as merged,
    ):
        reporter.step("load", f"{merged.name} on {device}")
        model = loading.load_merged(merged, config, recipe.dtype, device)
        rows = _encoded(model, sets)
        batch_size = options.batch_size or recipe.batch_size
        report = _quantize(model, rows, batch_size, reporter, resume)
        if lineage:
            # What the merged folder says of itself comes first.
            report.provenance.setdefault("merge", lineage)
        reporter.step("save", str(options.out))
        keeps = contextlib.closing(model.epmq_statistics) if config.save_statistics else None
        with keeps or contextlib.nullcontext():
            model.save(str(out), overwrite=options.overwrite)
    return RunResult(report, rows.counts)


def run_document(recipe: Recipe, out: Path, result: RunResult) -> dict[str, Any]:
    """All numbers of a run as plain data; of the checkpoint only its name, of rows none."""
    options = recipe.to_options()
    options["calibration"] = _without_rows(options["calibration"])
    return {
        "recipe": options,
        "checkpoint": out.name,
        "cut_rows": {name: rows.cut for name, rows in result.rows.items()},
        "report": result.report.to_dict(),
    }


def _without_rows(block: dict[str, Any]) -> dict[str, Any]:
    """A recipe's calibration; rows that were given in Python are nobody else's to read."""

    def public(source: Mapping[str, Any]) -> dict[str, Any]:
        return {k: "given in Python" if k == "rows" else v for k, v in source.items()}

    if isinstance(block.get("expert_column"), str):
        return public(block)
    return {
        name: [public(source) for source in each] if isinstance(each, list) else each
        for name, each in block.items()
    }


def recipe_rows(recipe: Recipe) -> dict[str, list[RowSet]]:
    """The rows that a recipe draws for every expert; as of ``read_calibration``."""
    return read_calibration(
        recipe.calibration,
        list(recipe.experts),
        data_free=recipe.data_free,
        seed=recipe.seed,
        folder=recipe.folder,
        form=recipe_form(recipe),
    )


def recipe_form(recipe: Recipe) -> RowForm:
    """What a calibration row is for the model of a recipe, merged already or not.

    Raises:
        EPMQInputError: there is no such model, or its configuration cannot be read.
    """
    from ..io.checkpoints import Checkpoint, resolve_source

    first = next(iter(recipe.experts.values()))
    like = recipe.merged or recipe.merge.base or first
    what = "`merged`" if recipe.merged else "the model to merge"
    with contextlib.closing(
        Checkpoint(resolve_source(recipe.source(like), what=what).path, what=what)
    ) as model:
        return form_of(model.config())


def check_method(recipe: Recipe) -> None:
    """Refuse a merge method, or parameters of one, with EPMQInputError."""
    if recipe.merge is None:
        return
    from ..merging import check_merge

    step = recipe.merge
    try:
        check_merge(step.method, step.parameters, step.base is not None, list(recipe.experts))
    except EPMQInputError as error:
        raise error.within("`merge`") from error


def _described_rows(sets: Mapping[str, list[RowSet]]) -> str:
    return "; ".join(
        f"{name}: {', '.join(one.taken for one in each)}" for name, each in sets.items()
    )


# ---- merge -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _merged_folder(
    recipe: Recipe, out: Path, options: RunOptions, device: str, reporter: Reporter
) -> Iterator[Path]:
    """The folder of the merged model; a temporary one is gone afterwards."""
    from ..io.checkpoints import resolve_source
    from ..io.output import claimed, hidden

    if recipe.merge is None:
        yield resolve_source(recipe.source(recipe.merged), what="`merged`").path
        return
    if recipe.merge.keep is not None:
        place = recipe.place(recipe.merge.keep)
        run_merge(recipe, place, device, reporter, options.batch_size)
        yield place
        return
    missing = [place for place in out.parents if not place.exists()]
    try:
        # Beside the output: the temporary folder of a machine is often too small for a model. What
        # a killed run left there goes.
        with claimed(hidden(out, "merge"), out) as scratch:
            # Its last part is what the provenance publishes.
            place = scratch / "merged"
            run_merge(recipe, place, device, reporter, options.batch_size)
            yield place
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # it holds the checkpoint
                place.rmdir()


def run_merge(
    recipe: Recipe, place: Path, device: str, reporter: Reporter, batch_size: int | None = None
) -> None:
    """Merge the recipe's experts into ``place``; ``batch_size`` is in place of the recipe's.

    A method that takes calibration is given the recipe's: the same draw of the same rows.
    """
    from ..merging import merge_methods

    step = recipe.merge
    rows = {}
    if merge_methods()[step.method]["needs_calibration"]:
        rows = {
            "calibration": recipe.calibration,
            "batch_size": batch_size or recipe.batch_size,
            "seed": recipe.seed,
            "base_folder": recipe.folder,
        }
    merge_with_progress(
        reporter,
        step.method,
        base=None if step.base is None else recipe.source(step.base),
        experts={name: recipe.source(spec) for name, spec in recipe.experts.items()},
        out=place,
        parameters=dict(step.parameters),
        device=device,
        **rows,
    )


def merge_with_progress(reporter: Reporter, method: str, **arguments: Any):
    """:func:`epmq_gptq.merging.merge` under a bar."""
    from ..merging import merge

    with contextlib.ExitStack() as stack:
        bar: list[StepProgress] = []

        def show(done: int, total: int, what: str) -> None:
            # The merge says how many steps it has when it has checked its inputs.
            if not bar:
                bar.append(stack.enter_context(StepProgress(reporter, "merge", total, "steps")))
            bar[0].advance(1, what)

        result = merge(method, progress=show, **arguments)
    reporter.step("merge", f"{method} of {len(arguments['experts'])} experts")
    return result


# ---- model -------------------------------------------------------------------------------------


def _encoded(model, sets: Mapping[str, list[RowSet]]) -> EncodedCalibration:
    """The rows of every expert as the loaded model takes them."""
    from ..calibration.batches import input_rules

    return input_rules(model).encode(sets)


def _quantize(
    model,
    rows: EncodedCalibration,
    batch_size: int,
    reporter: Reporter,
    resume: Path | None,
) -> QuantizationReport:
    from ..experts.linears import name_in_layer
    from ..host.model_linears import quantizable_linears
    from ..host.resume.session import CheckpointConfig

    checkpoint = None if resume is None else CheckpointConfig(resume)
    linears = list(quantizable_linears(model))
    work = work_of_kinds(linears)
    total = sum(work[name_in_layer(each.name)] for each in linears)
    with StepProgress(reporter, "quantize", len(linears), "modules", total) as progress:

        def subset_event(*, stage: str, layer_idx: int, module_names: list[str], **_) -> None:
            if stage == "quant_complete":
                done = sum(work.get(name, total / len(linears)) for name in module_names)
                progress.advance(len(module_names), f"layer {layer_idx}", done)

        # The host calls this whenever a group of modules of a layer has been rounded.
        model.subset_callback = subset_event
        try:
            result = model.quantize(rows, batch_size=batch_size, checkpoint=checkpoint)
        finally:
            model.subset_callback = None
    return result["epmq"]


def work_of_kinds(linears: Sequence[Linear]) -> dict[str, float]:
    """Kind of module → what one of it costs, in any unit; for the estimate of the time left.

    Gram, target and rounding all cost about inputs · (inputs + outputs): per token the first two,
    per column the last.
    """
    from ..experts.linears import name_in_layer

    costs: dict[str, list[int]] = {}
    for each in linears:
        cost = each.inputs * (each.inputs + each.outputs)
        costs.setdefault(name_in_layer(each.name), []).append(cost)
    return {kind: sum(each) / len(each) for kind, each in costs.items()}
