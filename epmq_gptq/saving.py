"""A save is whole or absent: written beside its place, verified, flushed, then moved there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoints import INDEX_NAME, Checkpoint
from .errors import EPMQError, EPMQInputError, EPMQNumericalError
from .experts import check_finite
from .output import check_output, new_folder

# What one packed linear layer consists of.
PACKED = ("qweight", "qzeros", "scales", "g_idx")
_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
        EPMQError: what was written does not read back as it should. The model stays in memory;
            ``save`` can be called again.
    """
    if not model.quantized:
        raise EPMQInputError("`save` before `quantize`: there is nothing quantized to save yet.")
    if options.get("split_by") is not None:
        raise EPMQInputError(
            "`split_by` makes a folder per layer, which serving engines do not load; use "
            "`max_shard_size`."
        )
    merged = Path(str(model.model_local_path))
    sources = {"merged model": merged} | {
        f"expert `{name}`": Path(path)
        for name, path in model.quantize_config.experts.items()
        if Path(path).is_dir()
    }
    target = check_output(Path(save_dir), sources, overwrite, option="save_dir")

    with new_folder(target) as staging:
        with contextlib.redirect_stdout(io.StringIO()):  # the host lists the files it wrote
            write(str(staging), *arguments, **options)
        _store_dense_tensors_as_merged(staging, merged)
        verify_checkpoint(staging, [m.module for m in model.epmq_report.modules])


def _store_dense_tensors_as_merged(folder: Path, merged: Path) -> None:
    """Give embeddings, norms and heads the dtype the merged model stores them in.

    A run that computes in float32 (the fast way on most CPUs) would otherwise double them, and
    some engines refuse GPTQ checkpoints with float32 tensors.
    """
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    source = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    stored = source.get("dtype") or source.get("torch_dtype")
    if stored not in _HALF or config.get(key) == stored:
        return
    written = Checkpoint(folder, what="the written checkpoint")
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
    checkpoint = Checkpoint(folder, what="the written checkpoint")
    for module in modules:
        for part in PACKED:
            if f"{module}.{part}" not in checkpoint:
                raise EPMQError(f"the written checkpoint lacks `{module}.{part}`.")
        if f"{module}.weight" in checkpoint:
            raise EPMQError(f"the written checkpoint still holds `{module}.weight`.")
    for name in checkpoint:
        if checkpoint.info(name).torch_dtype is not None:
            try:
                check_finite(checkpoint.read(name), f"the written checkpoint: `{name}`")
            except EPMQNumericalError as error:
                raise EPMQError(str(error)) from error
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", "bits")):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        if key not in content:
            raise EPMQError(f"the written `{file}` lacks `{key}`.")
    checkpoint.close()
