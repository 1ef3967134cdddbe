"""A checkpoint on a hub, of which headers, configuration and single tensors are fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from ...errors import EPMQInputError
from ...io.checkpoints import TensorInfo
from ...io.dtypes import DTYPES
from ...io.hub import open_remote


class RemoteCheckpoint:
    """The headers of a hub's safetensors, and what is asked for of the rest.

    Args:
        spec: ``org/name[@revision]``.
        what: how errors call it.

    Raises:
        EPMQInputError: it cannot be had, or is in another format.
    """

    def __init__(self, spec: str, *, what: str):
        self.what = what
        self._hub = open_remote(spec, what=what)
        self.repository, self.commit = self._hub.repository, self._hub.commit
        self._tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for file, header in self._hub.headers().items():
            for name, entry in header.tensors.items():
                info = TensorInfo(name, tuple(entry.shape), entry.dtype, file)
                self._tensors[name] = info
                self._offsets[name] = tuple(entry.data_offsets)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Header entry of ``name``."""
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """An int32 tensor; nothing else of its file is fetched."""
        info, (start, stop) = self._tensors[name], self._offsets[name]
        content = self._hub.read(info.file, start, stop)
        return torch.frombuffer(bytearray(content), dtype=DTYPES[info.dtype]).reshape(info.shape)

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return self.json("config.json") or {}

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file; None where there is no such file."""
        text = self._hub.file(name)
        if text is None:
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._not_json(name) from error
        if not isinstance(content, dict):
            raise self._not_json(name)
        return content

    def _not_json(self, name: str) -> EPMQInputError:
        return EPMQInputError(
            f"{self.what}: `{name}` is not readable as a JSON object.",
            code="EPMQ-F13",
            subject=f"`{name}`",
            remedy="Restore the file from where the model came from.",
        )
