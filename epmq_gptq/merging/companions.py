"""The files beside the weights: configuration and tokenizer, taken from one input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint, lies_inside
from ..errors import EPMQInputError
from .compatibility import DTYPES
from .shards import Entry

PATTERNS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of a checkpoint that can be merged, {} if absent.

    Raises:
        EPMQInputError: it is not a JSON object, or says that the weights are quantized.
    """
    try:
        config = checkpoint.config()
    except ValueError as error:
        raise EPMQInputError(f"{checkpoint.what}: `config.json` is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise EPMQInputError(f"{checkpoint.what}: `config.json` should be a JSON object.")
    if "quantization_config" in config:
        raise EPMQInputError(
            f"{checkpoint.what}: `config.json` has a `quantization_config`; only floating weights "
            "can be merged. Give the checkpoint it was quantized from."
        )
    return config


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The files of ``checkpoint`` that a reader of the merge needs beside the weights.

    Raises:
        EPMQInputError: one of them is a link out of the checkpoint.
    """
    names = {file.name for pattern in PATTERNS for file in checkpoint.path.glob(pattern)}
    files = [checkpoint.path / name for name in sorted(names | {"config.json"})]
    files = [file for file in files if file.is_file()]
    for file in files:
        if not lies_inside(checkpoint.path, file):
            raise EPMQInputError(
                f"{checkpoint.what}: `{file.name}` is a link out of the checkpoint. Put the file "
                "there."
            )
    return files


def copy_companions(checkpoint: Checkpoint, entries: Sequence[Entry], folder: Path) -> None:
    """Copy the companions of ``checkpoint`` into ``folder``.

    ``config.json`` is copied as it is, unless it names another dtype than the one written.
    """
    for file in companions(checkpoint):
        shutil.copyfile(file, folder / file.name)
    config = read_config(checkpoint)
    dtype = _main_dtype(entries)
    if config and dtype and _set_dtype(config, dtype):
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _main_dtype(entries: Sequence[Entry]) -> str | None:
    """The dtype that most bytes of the floating tensors have, as ``config.json`` spells it."""
    totals: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in DTYPES:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    if not totals:
        return None
    return str(DTYPES[max(totals, key=totals.__getitem__)]).removeprefix("torch.")


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Make ``config`` and its sub-configurations name ``dtype``; whether anything changed."""
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value != dtype:
            config[key] = dtype
            changed = True
        elif key.endswith("_config") and isinstance(value, dict):
            changed |= _set_dtype(value, dtype)
    return changed
