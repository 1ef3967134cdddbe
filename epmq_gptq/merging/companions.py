"""The files beside the weights: configuration and tokenizer, taken from one input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.checkpoints import Checkpoint
from ..io.dtypes import WEIGHTS
from ..io.folders import BESIDE, check_file, matching
from .shards import Entry


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The files of ``checkpoint`` that a reader of the merge needs beside the weights.

    Raises:
        EPMQInputError: one of them is a link out of the checkpoint, or cannot be read.
    """
    names = matching(checkpoint.path, ("config.json", "*.jinja", *BESIDE), checkpoint.what)
    return [check_file(checkpoint.path, name, checkpoint.what) for name in names]


def copy_companions(checkpoint: Checkpoint, entries: Sequence[Entry], folder: Path) -> None:
    """Copy the companions of ``checkpoint`` into ``folder``.

    ``config.json`` is copied as it is, unless it names another dtype than the one written.
    """
    for file in companions(checkpoint):
        shutil.copyfile(file, folder / file.name)
    config = checkpoint.config()
    dtype = _main_dtype(entries)
    if config and dtype and _set_dtype(config, dtype):
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _main_dtype(entries: Sequence[Entry]) -> str | None:
    """The dtype that most bytes of the floating tensors have, as ``config.json`` spells it."""
    totals: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in WEIGHTS:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    if not totals:
        return None
    return str(WEIGHTS[max(totals, key=totals.__getitem__)]).removeprefix("torch.")


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
