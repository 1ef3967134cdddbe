"""Weights in memory, read the way a checkpoint on disk is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQInputError
from .checkpoints import TensorInfo
from .dtypes import NAMES


class StateDict:
    """A state dict under the interface of :class:`~epmq_gptq.io.checkpoints.Checkpoint`.

    The tensors are neither copied nor moved before they are read; leave them as they are until the
    run is over.

    Args:
        tensors: name → tensor, on any device.
        what: how errors call it, for example ``"expert `math`"``.
        config: the model's configuration as plain data; {} where there is none.

    Raises:
        EPMQInputError: no tensors, something else than a tensor, or one without data of its own
            (meta, sharded, sparse, quantized).
    """

    path: Path | None = None

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        what: str,
        config: Mapping[str, Any] | None = None,
    ):
        self.what = what
        self._config = dict(config or {})
        self._tensors: dict[str, torch.Tensor] = {}
        if not tensors:
            raise EPMQInputError(
                f"{what}: the state dict is empty.",
                code="EPMQ-F15",
                subject=what,
                remedy="Give a model, its `state_dict()`, or a folder.",
            )
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not torch.is_tensor(tensor):
                raise EPMQInputError(
                    f"{what}: a state dict should map names to tensors, got "
                    f"{type(tensor).__name__} under {name!r}.",
                    code="EPMQ-F15",
                    subject=what,
                    remedy="Give a model, its `state_dict()`, or a folder.",
                )
            if tensor.is_meta:
                raise EPMQInputError(
                    f"{what}: tensor `{name}` is on the meta device, it has no data.",
                    code="EPMQ-F15",
                    subject=f"tensor `{name}`",
                    remedy="Load the model's weights first, or give its folder.",
                )
            tensor = tensor.detach()
            if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                kind = str(tensor.layout) if type(tensor) is torch.Tensor else type(tensor).__name__
                raise EPMQInputError(
                    f"{what}: tensor `{name}` is a {kind}, not a plain dense tensor.",
                    code="EPMQ-F06",
                    subject=f"tensor `{name}`",
                    remedy="Gather or convert it to one first, or give the model's folder.",
                )
            self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors in memory>"

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of ``name``; EPMQInputError if it is missing."""
        tensor = self._get(name)
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return TensorInfo(name, tuple(tensor.shape), dtype, "memory")

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, on the CPU."""
        return self._get(name).cpu()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start:stop`` along the first axis, on the CPU."""
        return self._get(name)[start:stop].cpu()

    def config(self) -> dict[str, Any]:
        """The model's configuration as plain data; {} where there is none."""
        return self._config

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes, in order of the names."""
        total = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self.read(name).contiguous()
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            # In blocks: `tobytes` of a whole embedding would be a second copy of it.
            for block in tensor.reshape(-1).view(torch.uint8).split(1 << 24):
                total.update(block.numpy().data)
        return total.hexdigest()

    def close(self) -> None:
        """Nothing is open; a checkpoint on disk has files."""

    def _get(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise EPMQInputError(
                f"{self.what}: tensor `{name}` is missing.",
                code="EPMQ-F01",
                subject=f"tensor `{name}`",
                remedy="Give the whole model's state dict.",
            ) from None
