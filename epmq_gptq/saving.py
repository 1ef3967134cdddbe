"""A save is whole or absent: written beside its place, verified, flushed, then moved there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoints import Checkpoint
from .errors import EPMQError, EPMQInputError, EPMQNumericalError
from .experts import check_finite

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
    target = Path(save_dir).expanduser().absolute()
    if not model.quantized:
        raise EPMQInputError("`save` before `quantize`: there is nothing quantized to save yet.")
    sources = [Path(str(model.model_local_path))]
    sources += [Path(path) for path in model.quantize_config.experts.values()]
    check_target(target, sources, overwrite=overwrite)

    with staged_folder(target, overwrite=overwrite) as staging:
        with contextlib.redirect_stdout(io.StringIO()):  # the host lists the files it wrote
            write(str(staging), *arguments, **options)
        _store_dense_tensors_as_merged(staging, sources[0])
        verify_checkpoint(staging, [m.module for m in model.epmq_report.modules])


def check_target(target: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Refuse an output folder that would destroy something.

    Raises:
        EPMQInputError: see :func:`save_whole`.
    """
    real = target.resolve()
    for source in sources:
        if not source.is_dir():
            continue
        other = source.resolve()
        if real == other or real in other.parents or other in real.parents:
            raise EPMQInputError(
                f"output `{target.name}` is, holds or lies in the source model `{other.name}`; "
                "choose another folder."
            )
    if target.is_file():
        raise EPMQInputError(f"output `{target.name}` is a file; choose a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise EPMQInputError(
            f"output folder `{target.name}` is not empty; choose another or pass `overwrite=True`."
        )


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    staging = target.with_name(f".{target.name}.tmp-{tag}")
    staging.mkdir()
    try:
        yield staging
        for file in sorted(staging.rglob("*")):
            _flush(file)
        _flush(staging)
        old = None
        if target.exists():
            if any(target.iterdir()):
                assert overwrite
                old = target.with_name(f".{target.name}.old-{tag}")
                os.replace(target, old)
        os.replace(staging, target)
        _flush(target.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    for shard in sorted(folder.glob("*.safetensors")):
        checkpoint = {}
        reader = Checkpoint(folder, what="output")
        for name in reader:
            if reader.info(name).file != shard.name:
                continue
            tensor = reader.read(name)
            dense = tensor.dtype == torch.float32 and not name.endswith(PACKED)
            checkpoint[name] = tensor.to(_HALF[stored]) if dense else tensor.clone()
        reader.close()
        save_file(checkpoint, shard, metadata={"format": "pt"})
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
