"""From a recipe to a checkpoint: read rows, merge, load, quantize, save.

What can be refused is refused in the order of what it costs to find out: options, places and rows
first, the merge next, the model last.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Reporter, StepProgress
from .errors import EPMQInputError
from .recipe import Recipe
from .rows import FittedRows, RowSet, fit_rows, read_rows

if TYPE_CHECKING:
    from .report import QuantizationReport

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class RunOptions:
    """What a shell decides about a run, not the recipe.

    Attributes:
        out: folder of the checkpoint.
        overwrite: replace what is there.
        device: "cpu", "cuda", "cuda:1"; None for a GPU where there is one.
        batch_size: instead of the recipe's.
    """

    out: Path
    overwrite: bool = False
    device: str | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        report: module by module.
        rows: what was read, cut and counted per expert.
    """

    report: QuantizationReport
    rows: dict[str, FittedRows]


def quantize_recipe(recipe: Recipe, options: RunOptions, reporter: Reporter) -> RunResult:
    """Run a recipe.

    Raises:
        EPMQInputError: an option, folder or row cannot be used as asked.
        EPMQNumericalError: numbers that cannot be trusted, see ``EPMQConfig.on_bad_module``.
    """
    out = Path(options.out).expanduser().absolute()
    check_free(out, overwrite=options.overwrite)
    if options.batch_size is not None and options.batch_size < 1:
        raise EPMQInputError(f"`--batch-size` should be positive, got {options.batch_size}.")
    with reporter.quiet_host():
        device = _device(options.device)
        _check_method(recipe)
        _check_places(recipe, out, options.overwrite, reporter)
        for source in (each for sources in recipe.calibration.values() for each in sources):
            if source.dataset is not None:
                reporter.step("fetch", f"dataset {source.label}")
        sets = {
            name: read_rows(sources, expert=name, seed=recipe.seed, folder=recipe.folder)
            for name, sources in recipe.calibration.items()
        }
        reporter.step("rows", _described_rows(sets))
        config = recipe.config()
        from .host import context_length

        with _merged_folder(recipe, out, options, device, reporter) as merged:
            reporter.step("load", f"{merged.name} on {device}")
            model = _load(merged, config, recipe, device)
            limit = context_length(model.model.config)
            rows = {
                name: fit_rows(each, model.tokenizer, expert=name, limit=limit)
                for name, each in sets.items()
            }
            report = _quantize(model, rows, options.batch_size or recipe.batch_size, reporter)
            reporter.step("save", str(options.out))
            model.save(str(out), overwrite=options.overwrite)
    return RunResult(report, rows)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything slow is imported.

    Raises:
        EPMQInputError: naming the CLI's options.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise EPMQInputError(
            f"`--out`: folder `{out.name}` is not empty; choose another one or pass --overwrite."
        )


def _device(wanted: str | None) -> str:
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    if kind not in DEVICES:
        raise EPMQInputError(f"`--device` should be one of {', '.join(DEVICES)}, got `{wanted}`.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EPMQInputError("`--device cuda`: torch sees no GPU here; use `--device cpu`.")
    return wanted


def _check_method(recipe: Recipe) -> None:
    if recipe.merge is None:
        return
    from .merging import check_merge

    step = recipe.merge
    try:
        check_merge(step.method, step.parameters, step.base is not None, list(recipe.experts))
    except EPMQInputError as error:
        raise EPMQInputError(f"`merge`: {error}") from error


def _check_places(recipe: Recipe, out: Path, overwrite: bool, reporter: Reporter) -> None:
    """Every model is there and readable, and the output destroys none of them."""
    from .checkpoints import open_checkpoint
    from .output import check_output

    specs = {f"expert `{name}`": spec for name, spec in recipe.experts.items()}
    if recipe.merged is not None:
        specs["`merged`"] = recipe.merged
    elif recipe.merge.base is not None:
        specs["`merge.base`"] = recipe.merge.base
    folders = {}
    for what, spec in specs.items():
        place = recipe.source(spec)
        if not Path(place).is_absolute():
            reporter.step("fetch", place)
        checkpoint, source = open_checkpoint(place, what=what)
        quantized = "quantization_config" in checkpoint.config()
        checkpoint.close()
        if quantized:
            raise EPMQInputError(
                f"{what}: `{source.name}` is already quantized; give the full-precision model."
            )
        folders[what] = source.path
    check_output(out, folders, overwrite)
    if recipe.merge is not None and recipe.merge.keep is not None:
        _check_keep(recipe.place(recipe.merge.keep), out)


def _check_keep(keep: Path, out: Path) -> None:
    real, target = keep.resolve(), out.resolve()
    if real == target or real in target.parents or target in real.parents:
        raise EPMQInputError(
            f"`merge.keep`: `{keep.name}` is, holds or lies in the output folder; choose another."
        )
    if keep.is_file() or keep.is_dir() and any(keep.iterdir()):
        raise EPMQInputError(
            f"`merge.keep`: `{keep.name}` is there already; to quantize it, replace the `merge` "
            f"block by `merged: {keep.name}`, or choose another folder."
        )


def _described_rows(sets: Mapping[str, list[RowSet]]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{len(s.rows)} of {s.available} ({s.source.label})" for s in each)
        for name, each in sets.items()
    )


# ---- merge -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _merged_folder(
    recipe: Recipe, out: Path, options: RunOptions, device: str, reporter: Reporter
) -> Iterator[Path]:
    """The folder of the merged model; a temporary one is gone afterwards."""
    from .checkpoints import resolve_source

    if recipe.merge is None:
        yield resolve_source(recipe.source(recipe.merged), what="`merged`").path
        return
    if recipe.merge.keep is not None:
        place = recipe.place(recipe.merge.keep)
        run_merge(recipe, place, device, reporter)
        yield place
        return
    # Beside the output: the temporary folder of a machine is often too small for a model.
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.merge-", dir=out.parent))
    try:
        # Its last part is what the provenance publishes.
        place = scratch / "merged"
        run_merge(recipe, place, device, reporter)
        yield place
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_merge(recipe: Recipe, place: Path, device: str, reporter: Reporter) -> None:
    """Merge the recipe's experts into ``place``."""
    step = recipe.merge
    merge_with_progress(
        reporter,
        step.method,
        base=None if step.base is None else recipe.source(step.base),
        experts={name: recipe.source(spec) for name, spec in recipe.experts.items()},
        out=place,
        parameters=dict(step.parameters),
        device=device,
    )


def merge_with_progress(reporter: Reporter, method: str, **arguments: Any):
    """:func:`epmq_gptq.merging.merge` under a bar."""
    from .merging import merge

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


def _load(merged: Path, config, recipe: Recipe, device: str):
    import torch
    from gptqmodel import GPTQModel

    dtype = recipe.dtype
    if dtype is None and device == "cpu":
        # The host would take bfloat16, 15 to 75 times slower on CPUs without AVX512-BF16.
        dtype = "float32"
    options = {} if dtype in (None, "auto") else {"dtype": getattr(torch, dtype)}
    try:
        return GPTQModel.load(str(merged), config, device=device, **options)
    except EPMQInputError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        # What the host refuses here is an option, or a model that it does not know.
        raise EPMQInputError(
            f"GPTQModel cannot load `{merged.name}` with these options: {error}"
        ) from error


def _quantize(
    model, rows: dict[str, FittedRows], batch_size: int, reporter: Reporter
) -> QuantizationReport:
    from .model_linears import quantizable_linears

    total = sum(1 for _ in quantizable_linears(model))
    with StepProgress(reporter, "quantize", total, "modules") as progress:

        def subset_event(*, stage: str, layer_idx: int, module_names: list[str], **_) -> None:
            if stage == "quant_complete":
                progress.advance(len(module_names), f"layer {layer_idx}")

        # The host calls this whenever a group of modules of a layer has been rounded.
        model.subset_callback = subset_event
        try:
            result = model.quantize(
                {name: fitted.rows for name, fitted in rows.items()}, batch_size=batch_size
            )
        finally:
            model.subset_callback = None
    return result["epmq"]
