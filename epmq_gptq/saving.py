"""A save is whole or absent: written beside its place, verified, flushed, then moved there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .card import write_card
from .checkpoints import Checkpoint
from .errors import EPMQError, EPMQInputError
from .folders import INDEX_NAME, read_json
from .output import check_output, new_folder
from .recorded.bundle import FOLDER_NAME, Bundle
from .weights import check_finite

# What one packed linear layer consists of.
PACKED = ("qweight", "qzeros", "scales", "g_idx")
_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
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

    with new_folder(target) as staging:
        with contextlib.redirect_stdout(io.StringIO()):  # the host lists the files it wrote
            write(str(staging), *arguments, **options)
        _store_dense_tensors_as_merged(staging, merged)
        model.epmq_report.write(staging)
        if getattr(model, "epmq_statistics", None) is not None:
            with _reading_back():
                model.epmq_statistics.copy_to(staging / FOLDER_NAME)
                Bundle(staging / FOLDER_NAME).verify()
        # Whatever card the host may have copied is of another model. The folder is new.
        write_card(staging, overwrite=True, sources=model.epmq_sources)
        verify_checkpoint(staging, [m.module for m in model.epmq_report.modules])
    model.epmq_saved = target


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
    if stored not in _HALF or config.get(key) == stored:
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
            tensors[name] = tensor.to(_HALF[stored]) if dense else tensor.clone()
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


def verify_checkpoint(folder: Path, modules: list[str]) -> None:
    """Read back what was written: every shard, every quantized layer, every floating value.

    Raises:
        EPMQError: naming the file or tensor.
    """
    with _reading_back():
        checkpoint = Checkpoint(folder, what=_WRITTEN)
        for module in modules:
            for part in PACKED:
                if f"{module}.{part}" not in checkpoint:
                    raise _written_wrong(f"lacks `{module}.{part}`", f"module `{module}`")
            if f"{module}.weight" in checkpoint:
                raise _written_wrong(f"still holds `{module}.weight`", f"module `{module}`")
        for name in checkpoint:
            if checkpoint.info(name).torch_dtype is not None:
                check_finite(checkpoint.read(name), f"{_WRITTEN}: `{name}`")
        for file, key in (("config.json", "quantization_config"), ("quantize_config.json", "bits")):
            if key not in read_json(folder, file, _WRITTEN):
                raise _written_wrong(f"lacks `{key}` in `{file}`", f"`{file}`")
        checkpoint.close()


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
