"""The models of a run and the folder of its result, checked before anything slow."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EPMQInputError
from ..io.console import Reporter
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..io.output import Need

_IN_LAYER = re.compile(r"\.\d+\.")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything slow is imported.

    Raises:
        EPMQInputError: naming the CLI's options.
    """
    try:
        taken = out.is_dir() and any(out.iterdir())
    except OSError:  # a name too long, a folder that is not ours: refused with all other places
        taken = False
    if taken and not overwrite:
        raise EPMQInputError(
            f"`--out`: folder `{out.name}` is not empty.",
            code="EPMQ-F45",
            subject="`--out`",
            remedy="Choose another one or pass --overwrite.",
        )


def pinned(recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe with every hub id at the commit that it stands for now, and fetched.

    A branch may move during a run; the merge, the quantization and the record must mean one model.

    Raises:
        EPMQInputError: a model is neither here nor to be had from the hub.
    """
    from ..experts.experts import split_adapter
    from ..io.checkpoints import resolve_source

    require_pinned = recipe.quantize.get("require_pinned") is True

    def pin(spec: str, what: str) -> str:
        parts = []
        for part in filter(None, split_adapter(recipe.source(spec))):
            if not Path(part).is_absolute():
                reporter.step("fetch", part)
            source = resolve_source(part, what=what, require_pinned=require_pinned)
            local = Path(part).is_absolute()
            parts.append(part if local else f"{source.name}@{source.revision}")
        return "+".join(parts)

    result = copy.copy(recipe)
    result.experts = {name: pin(each, f"expert `{name}`") for name, each in recipe.experts.items()}
    result.quantize = dict(recipe.quantize)
    if recipe.merged is not None:
        result.merged = pin(recipe.merged, "`merged`")
    elif recipe.merge.base is not None:
        base = pin(recipe.merge.base, "`merge.base`")
        result.merge = recipe.merge.model_copy(update={"base": base})
        result.quantize.setdefault("base", base)
    if isinstance(recipe.quantize.get("base"), str):
        result.quantize["base"] = pin(recipe.quantize["base"], "`quantize.base`")
    return result


def check_places(recipe: Recipe, out: Path, overwrite: bool, resume: Path | None = None) -> None:
    """Refuse models that cannot be read, and an output that would destroy one or has no room.

    Args:
        resume: folder of the run's checkpoint, if it keeps one.

    Raises:
        EPMQInputError: naming the model or the place.
    """
    from ..io.output import check_disks, check_output

    folders, needs = _open_models(recipe, out, resume)
    check_output(out, folders, overwrite, option="--out")
    if recipe.merge is not None and recipe.merge.keep is not None:
        _check_keep(recipe.place(recipe.merge.keep), out, folders)
    check_disks(
        needs,
        option="the run",
        remedy="Free some space, or choose other disks: `--out` is where the checkpoint and a "
        "temporary merge go, the variable TMPDIR where layers wait.",
    )
    if resume is not None:
        from ..host.resume.session import check_root

        check_root(resume, folders | {"output": out}, option="--resume")


def _open_models(
    recipe: Recipe, out: Path, resume: Path | None
) -> tuple[dict[str, Path], list[Need]]:
    """What errors call each model → its folder; and what the run will write at least."""
    from ..experts.experts import Experts
    from ..experts.weights import refuse_quantized
    from ..io.checkpoints import check_folder, open_checkpoint

    specs = {"`merged`": recipe.merged}
    if recipe.merge is not None:  # which takes whole models only
        specs = {} if recipe.merge.base is None else {"`merge.base`": recipe.merge.base}
        specs |= {f"expert `{name}`": spec for name, spec in recipe.experts.items()}
    folders, needs = {}, []
    for what, spec in specs.items():
        checkpoint, source = open_checkpoint(recipe.source(spec), what=what)
        refuse_quantized(checkpoint, what)
        check_folder(source.path, what=what)
        folders[what] = source.path
        # All models of a merge are of one size.
        needs = needs or _needs(checkpoint, recipe, out, resume)
        checkpoint.close()
    if recipe.merge is None:
        experts = Experts(
            {name: recipe.source(spec) for name, spec in recipe.experts.items()},
            base=recipe.quantize.get("base"),
        )
        folders |= experts.folders
        experts.close()
    return folders, needs


def _needs(checkpoint, recipe: Recipe, out: Path, resume: Path | None) -> list[Need]:
    """What is written where, at least: the checkpoint, layers that wait for it, and the merge."""
    from ..io.output import Need

    bits = recipe.quantize.get("bits", 4)
    bits = int(bits) if bits in range(2, 9) else 2  # refused later, with its rule
    packed = dense = merge = 0
    for info in map(checkpoint.info, checkpoint):
        stored = info.nbytes
        merge += stored
        # What is quantized is a matrix of a numbered layer. Others stay as they are; what the run
        # would store in half precision is counted as that.
        if len(info.shape) == 2 and _IN_LAYER.search(info.name):
            packed += info.numel * bits // 8
        else:
            dense += min(stored, 2 * info.numel)
    needs = [Need(out, packed + dense, "the checkpoint")]
    if resume is not None:
        # Finished layers are there twice: in the store, and where the host moves them.
        needs.append(Need(resume, 2 * packed, "what it goes on from after a kill"))
    elif recipe.quantize.get("offload_to_disk", True):
        # The host moves every finished layer to the temporary folder until it is saved.
        needs.append(Need(Path(tempfile.gettempdir()), packed, "finished layers"))
    if recipe.merge is not None:
        keep = recipe.merge.keep
        place = out if keep is None else recipe.place(keep)
        needs.append(Need(place, merge, "the merged model"))
    return needs


def _check_keep(keep: Path, out: Path, folders: Mapping[str, Path]) -> None:
    from ..io.output import check_output

    if keep.is_file() or keep.is_dir() and any(keep.iterdir()):
        raise EPMQInputError(
            f"`merge.keep`: `{keep.name}` is there already.",
            code="EPMQ-F45",
            subject="`merge.keep`",
            remedy=f"To quantize it, replace the `merge` block by `merged: {keep.name}`, or choose "
            "another folder.",
        )
    check_output(keep, {**folders, "output": out}, False, option="merge.keep")
