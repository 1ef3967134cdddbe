"""A save is whole or absent: written beside its place, verified, flushed, then moved there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checks.engines.checkpoint import Reading
from ..checks.engines.packed import PACKED, dequantized_rows
from ..checks.validate import validate
from ..errors import EPMQError, EPMQInputError
from ..io.checkpoints import Checkpoint
from ..io.dtypes import SPELLED
from ..io.folders import INDEX_NAME, read_json
from ..io.output import check_output, check_space, new_folder
from ..publish.card import write_card
from ..run_report import ModuleReport
from .recorded.bundle import FOLDER_NAME, Bundle

# Rows of the rounded weight are compared up to the half precision that scales are stored in
# (2^-9 for bfloat16) and that the rows are kept in.
ROUNDED_TOLERANCE = 0.01
# Bytes for headers, the report and the card, beside one per cent.
_MARGIN = 1 << 20
# What errors call what was written, and what to do where it does not read back.
_WRITTEN = "the written checkpoint"
_AGAIN = (
    "Nothing was left there and the model is still in memory: `save` again, if need be to another "
    "disk."
)


def save_whole(
    model,
    write: Callable[..., None],
    save_dir: str | Path,
    *arguments,
    overwrite: bool = False,
    **options,
) -> None:
    """Save a quantized model so that a crash, a full disk or a bad tensor leaves nothing behind.

    Args:
        model: the host's model, quantized with an ``EPMQConfig``.
        write: the host's own save, taking a folder.
        save_dir: where the checkpoint goes. It must not exist, or be empty, unless ``overwrite``.
        overwrite: replace what is there, after the new checkpoint is complete.

    Raises:
        EPMQInputError: the place is taken, or is, holds or lies in a source model's folder.
        EPMQError: what was written does not read back as it should, or the disk ran full. The
            model stays in memory; ``save`` can be called again.
    """
    if not model.quantized:
        raise EPMQInputError(
            "`save` came before `quantize`: there is nothing quantized to save yet.",
            code="EPMQ-F52",
            subject="`save`",
            remedy="Call `quantize` first.",
        )
    if options.get("split_by") is not None:
        raise EPMQInputError(
            "`split_by` makes a folder per layer, which serving engines do not load.",
            code="EPMQ-O01",
            subject="`split_by`",
            remedy="Use `max_shard_size`.",
        )
    merged = Path(str(model.model_local_path))
    target = check_output(Path(save_dir), model.epmq_sources, overwrite, option="save_dir")
    statistics = getattr(model, "epmq_statistics", None)
    check_space(
        target,
        _bytes_to_write(model, merged, None if statistics is None else statistics.path),
        option="save_dir",
        remedy="Free some space or choose another disk; the model is still in memory.",
    )

    with new_folder(target, overwrite=overwrite) as staging:
        with contextlib.redirect_stdout(io.StringIO()):  # the host lists the files it wrote
            write(str(staging), *arguments, **options)
        _store_dense_tensors_as_merged(staging, merged)
        if not model.trust_remote_code:
            _name_no_code(staging)
        model.epmq_report.write(staging)
        if statistics is not None:
            with _reading_back():
                statistics.copy_to(staging / FOLDER_NAME)
                Bundle(staging / FOLDER_NAME).verify()
        # Whatever card the host may have copied is of another model. The folder is new.
        write_card(staging, overwrite=True, sources=model.epmq_sources)
        verify_checkpoint(staging, model.epmq_report.modules, tensors_of(model.model))
    model.epmq_saved = target


def _bytes_to_write(model, merged: Path, statistics: Path | None) -> int:
    """What a save takes at its largest, and a little more."""
    distinct = {_identity(tensor): tensor for tensor in tensors_of(model.model).values()}
    tensors = sum(tensor.nbytes for tensor in distinct.values())
    # The tokenizer's files are written again, and those of the configuration.
    files = [file for file in merged.iterdir() if file.suffix != ".safetensors"]
    files += [] if statistics is None else list(statistics.iterdir())
    others = sum(file.stat().st_size for file in files if file.is_file())
    return tensors + others + (tensors + others) // 100 + _MARGIN


def _store_dense_tensors_as_merged(folder: Path, merged: Path) -> None:
    """Give embeddings, norms and heads the dtype the merged model stores them in.

    A run that computes in float32 (the fast way on most CPUs) would otherwise double them, and
    some engines refuse GPTQ checkpoints with float32 tensors.
    """
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    source = read_json(merged, "config.json", "the merged model")
    key = "dtype" if "dtype" in config else "torch_dtype"
    stored = source.get("dtype") or source.get("torch_dtype")
    if stored not in SPELLED or stored == "float32" or config.get(key) == stored:
        return
    with _reading_back():
        written = Checkpoint(folder, what=_WRITTEN)
    shards: dict[str, list[str]] = {}
    total = 0
    for name in written:
        shards.setdefault(written.info(name).file, []).append(name)
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            tensor = written.read(name)
            dense = tensor.dtype == torch.float32 and not name.endswith(PACKED)
            tensors[name] = tensor.to(SPELLED[stored]) if dense else tensor.clone()
            total += tensors[name].nbytes
        written.close()  # the file is about to be replaced under its mapping
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index_file = folder / INDEX_NAME
    if index_file.is_file():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = total
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config[key] = stored
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name_no_code(folder: Path) -> None:
    """Drop what says that the merge has code of its own: it was not run, and is not saved.

    Who loads the checkpoint and trusts it would run whatever lies under these names.
    """
    for file in folder.glob("*config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if _dropped(content, "auto_map"):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            file.write_text(text, encoding="utf-8")


def _dropped(content: Any, key: str) -> bool:
    """Remove a key from nested objects; whether it was there."""
    if not isinstance(content, dict):
        return False
    found = content.pop(key, None) is not None
    return any([_dropped(value, key) for value in content.values()]) or found


def verify_checkpoint(
    folder: Path, modules: Sequence[ModuleReport], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Read back what was written and compare it with what is in memory.

    The tensors are those of the model, of its shapes; the checkpoint is whole, see
    :func:`~epmq_gptq.checks.validate.validate`; and two rows of every layer, dequantized, are those
    that were rounded.

    Args:
        folder: what was written.
        modules: the quantized layers.
        tensors: what must be there, and nothing else, see :func:`tensors_of`.

    Raises:
        EPMQError: naming the file or tensor.
    """
    with _reading_back(), contextlib.closing(Checkpoint(folder, what=_WRITTEN)) as checkpoint:
        _check_names(checkpoint, tensors)
        reading = validate(checkpoint, [module.module for module in modules])
        for module in modules:
            _check_rounded(checkpoint, module, reading)


def tensors_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name → what a checkpoint of it holds under that name; of tied tensors all names."""
    found: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
    for place, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{place}.{name}" if place else name] = buffer
    return found


def _identity(tensor: torch.Tensor) -> int:
    """The same for tied tensors; finished layers have no memory, only files of the host."""
    return id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _check_names(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    there = {_identity(tensor) for name, tensor in tensors.items() if name in checkpoint}
    for name, tensor in tensors.items():
        if name not in checkpoint and tensor.numel() and _identity(tensor) not in there:
            raise _written_wrong(f"lacks `{name}`", f"tensor `{name}`")
    for name in checkpoint:
        if name not in tensors:
            raise _written_wrong(f"holds `{name}`, which the model lacks", f"tensor `{name}`")
        shape, expected = checkpoint.info(name).shape, tuple(tensors[name].shape)
        if shape != expected:
            raise _written_wrong(
                f"holds `{name}` in the shape {shape}, not {expected}", f"tensor `{name}`"
            )


def _check_rounded(checkpoint: Checkpoint, module: ModuleReport, reading: Reading) -> None:
    """Two rows of one layer, dequantized, against those that were rounded in memory."""
    if module.rounded is None:
        return  # rounded by another process, before this one went on with its run
    parts = {part: checkpoint.read(f"{module.module}.{part}") for part in PACKED}
    shape = reading.shapes[module.module]
    rows = dequantized_rows(parts, (0, shape.outputs - 1), shape, reading.facts.export.format)
    rounded = module.rounded.float()
    if float((rows - rounded).norm()) > ROUNDED_TOLERANCE * float(rounded.norm()):
        raise _written_wrong(
            f"holds other weights for `{module.module}` than were rounded",
            f"module `{module.module}`",
        )


def _written_wrong(what: str, subject: str) -> EPMQError:
    return EPMQError(f"{_WRITTEN} {what}.", code="EPMQ-S01", subject=subject, remedy=_AGAIN)


@contextlib.contextmanager
def _reading_back() -> Iterator[None]:
    """Whatever is wrong with the files of this save is a failed save, not a bad input."""
    try:
        yield
    except EPMQError as error:
        raise EPMQError(
            error.cause, code="EPMQ-S01", subject=error.subject, remedy=_AGAIN
        ) from error
