"""Weights of linear layers: found in a checkpoint or a state dict, checked, and read alone."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import EPMQInputError, EPMQNumericalError
from ..io.dtypes import WEIGHTS
from ..method.nonfinite import is_finite
from .adapters import Update
from .linears import Linear, StoredWeight, piece, resolve

# Tensors that say a checkpoint holds codes, not weights.
QUANTIZED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".absmax", ".scales")
# Rows of W_0 + s B A that are built at once where a norm of each is needed (DoRA).
_ROWS = 1024
_REMEDY = "An expert must hold every linear layer of the merged model."


def find_weight(store: Any, linear: Linear, only: StoredWeight | None = None) -> StoredWeight:
    """Where ``store`` holds the weight of ``linear``.

    Args:
        store: checkpoint or state dict.
        linear: the layer.
        only: the one place to look, instead of all places the layer knows.

    Raises:
        EPMQInputError: it is missing, of another shape, or no floating tensor.
    """
    stored = only or resolve(linear, store)
    if stored is None:
        name = linear.tensors[0]
        raise EPMQInputError(
            f"`{name}` is missing.", code="EPMQ-F01", subject=f"tensor `{name}`", remedy=_REMEDY
        )
    info = store.info(stored.tensor)
    shape = piece(info.shape, stored)
    if shape != linear.shape:
        raise EPMQInputError(
            f"`{stored.tensor}` has shape {shape}, the merged model has {linear.shape}.",
            code="EPMQ-F03",
            subject=f"tensor `{stored.tensor}`",
            remedy=_REMEDY,
        )
    if info.dtype not in WEIGHTS:
        raise EPMQInputError(
            f"`{stored.tensor}` has dtype {info.dtype}, not one of F32, F16 and BF16.",
            code="EPMQ-F06",
            subject=f"tensor `{stored.tensor}`",
            remedy="Convert it to one of them.",
        )
    return stored


def read_weight(store: Any, stored: StoredWeight) -> torch.Tensor:
    """The weight as it is stored, on the CPU; of a memory-mapped shard it is the file itself."""
    if stored.index is None:
        return piece(store.read(stored.tensor), stored)
    # One entry of a stack: the others stay on disk.
    entry = store.read_rows(stored.tensor, stored.index, stored.index + 1)
    return piece(entry, StoredWeight(stored.tensor, 0, stored.part))


def read_rows(
    store: Any, stored: StoredWeight, linear: Linear, start: int, stop: int
) -> torch.Tensor:
    """Rows of ``W: (out, in)``, ``(stop − start, in)`` fp32 on the CPU."""
    if stored.index is None and stored.part is None and not linear.transposed:
        return store.read_rows(stored.tensor, start, stop).float()
    return oriented(read_weight(store, stored), linear, "cpu")[start:stop].clone()


def oriented(W: torch.Tensor, linear: Linear, device: torch.device | str) -> torch.Tensor:
    """A stored weight as ``W: (out, in)`` fp32 on ``device``."""
    W = W.to(device=device, dtype=torch.float32)
    return W.t() if linear.transposed else W


def row_norms(W: torch.Tensor, update: Update) -> torch.Tensor:
    """Norms ``(out,)`` of the rows of W_0 + B A, a block of rows at a time."""
    blocks = zip(W.split(_ROWS), update.B.split(_ROWS), strict=True)
    return torch.cat([(rows + B @ update.A).norm(dim=1) for rows, B in blocks])


def quantized_by(store: Any) -> str:
    """What says that a model's weights are codes already; "" where they are plain numbers.

    Tensors by their names, ``quantization_config`` in config.json, or a ``quantize_config.json``.

    Raises:
        EPMQInputError: config.json cannot be read.
    """
    tensor = next((name for name in store if name.endswith(QUANTIZED_SUFFIXES)), None)
    if tensor is not None:
        return f"it holds `{tensor}`"
    block = store.config().get("quantization_config")
    if block is not None:
        method = block.get("quant_method", "?") if isinstance(block, dict) else "?"
        return f"`quantization_config` says {method!r}"
    path = getattr(store, "path", None)
    is_listed = path is not None and (path / "quantize_config.json").is_file()
    return "it holds `quantize_config.json`" if is_listed else ""


def refuse_quantized(store: Any, what: str) -> None:
    """Refuse a model whose weights are codes already.

    Raises:
        EPMQInputError: they are, or config.json cannot be read; ``what`` is how it calls the model.
    """
    reason = quantized_by(store)
    if reason:
        raise EPMQInputError(
            f"{what}: already quantized ({reason}).",
            code="EPMQ-F07",
            subject=what,
            remedy="Give the full-precision model.",
        )


def check_finite(
    tensor: torch.Tensor,
    what: str,
    *,
    module: str | None = None,
    expert: str | None = None,
    code: str = "EPMQ-N01",
    remedy: str = "",
) -> None:
    """Raise :class:`EPMQNumericalError` naming the count and first index of non-finite entries."""
    if is_finite(tensor):
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    first = tuple(bad.nonzero()[0].tolist())
    raise EPMQNumericalError(
        f"{what} holds {count} non-finite value{'s' if count > 1 else ''}, the first at index "
        f"{first}.",
        module=module,
        expert=expert,
        code=code,
        subject=what,
        remedy=remedy or "Find where it came from; nothing sensible can be made of it.",
    )
