"""Safetensors shards, written one tensor at a time."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EPMQInputError
from ..io.dtypes import DTYPES
from ..io.folders import INDEX_NAME, WEIGHTS_NAME


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' code

    @property
    def nbytes(self) -> int:
        """How many bytes its data takes."""
        if self.dtype not in DTYPES:
            raise EPMQInputError(
                f"tensor `{self.name}` has the dtype {self.dtype}, which cannot be written.",
                code="EPMQ-F06",
                subject=f"tensor `{self.name}`",
                remedy=f"Convert it to one of {', '.join(DTYPES)}.",
            )
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardWriter:
    """Safetensors shards of which every header is known before the first tensor.

    ``safetensors.save_file`` wants a whole shard in memory; here each tensor goes to its place in
    its file and is forgotten, in whatever order they come.

    Args:
        folder: where the shards go.
        entries: all tensors, in the order in which they fill the shards.
        max_shard_bytes: no shard holds more data, unless one tensor does.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_shard_bytes: int):
        assert sys.byteorder == "little"
        self._folder = folder
        self._place: dict[str, tuple[Path, int, Entry]] = {}
        self._missing = {entry.name for entry in entries}
        self.total_bytes = sum(entry.nbytes for entry in entries)
        shards = _fill(entries, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS_NAME
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start(folder / name, shard)
        if len(shards) > 1:
            files = {name: place[0].name for name, place in self._place.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": files}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX_NAME).write_text(text, encoding="utf-8")

    def _start(self, file: Path, shard: list[Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        # Readers map the file, so data must be aligned to its own size: the widest come first.
        shard = sorted(shard, key=lambda entry: -DTYPES[entry.dtype].itemsize)
        for entry in shard:
            ends.append(ends[-1] + entry.nbytes)
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": ends[-2:],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + ends[-1])
        for entry, start in zip(shard, ends, strict=False):
            self._place[entry.name] = (file, 8 + len(text) + start, entry)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its place."""
        file, offset, entry = self._place[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert tuple(tensor.shape) == entry.shape and data.nbytes == entry.nbytes
        with open(file, "r+b") as stream:
            stream.seek(offset)
            stream.write(data.data)
        self._missing.remove(name)

    def finish(self) -> None:
        """Assert that every tensor was written, once."""
        assert not self._missing


def _fill(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards
