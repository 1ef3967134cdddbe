"""The experts' weights: checked from their headers before any compute, read tensor by tensor.

"Expert" always means one of the K models that were merged; the experts of a mixture-of-experts
layer are called *routed modules*.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from .checkpoints import Checkpoint, Source, open_checkpoint
from .errors import EPMQInputError, EPMQNumericalError
from .linears import Linear

# How many offending tensors an error spells out.
_LISTED = 20
# Tensors that say a checkpoint holds codes, not weights.
_QUANTIZED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".absmax")
# Values of config.json that change what a linear layer's input means.
_STRUCTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
)


class Experts:
    """The K experts of one run.

    Args:
        sources: name → folder or hub id.

    Raises:
        EPMQInputError: a source cannot be resolved or read as safetensors, or is quantized.
    """

    def __init__(self, sources: Mapping[str, str]):
        self.sources: dict[str, Source] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._tensors: dict[tuple[str, str], str] = {}  # (expert, module) -> tensor name
        # Several devices may fold at once; a memory-mapped shard is read by one thread at a time.
        self._lock = threading.Lock()
        for name, spec in sources.items():
            checkpoint, source = open_checkpoint(spec, what=f"expert `{name}`")
            self._checkpoints[name], self.sources[name] = checkpoint, source
            quantized = next((t for t in checkpoint if t.endswith(_QUANTIZED_SUFFIXES)), None)
            if quantized is not None:
                raise EPMQInputError(
                    f"expert `{name}`: already quantized (it holds `{quantized}`); give the "
                    "full-precision expert."
                )

    @property
    def names(self) -> list[str]:
        """The experts in the order in which they are folded."""
        return list(self._checkpoints)

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of one expert."""
        return self._checkpoints[name]

    def check_structure(self, merged_config: Mapping) -> None:
        """Refuse an expert whose ``config.json`` describes another network than the merged one.

        Raises:
            EPMQInputError: naming the expert, the value and both sides.
        """
        for name, checkpoint in self._checkpoints.items():
            config = checkpoint.config()
            for key in _STRUCTURE:
                # Older files leave out or null what newer ones spell out.
                mine, theirs = config.get(key), merged_config.get(key)
                if None not in (mine, theirs) and mine != theirs:
                    raise EPMQInputError(
                        f"expert `{name}`: `{key}` is {mine!r}, the merged model has "
                        f"{theirs!r}; an expert must be a fine-tune of the same "
                        "network."
                    )

    def bind(self, linears: Iterable[Linear]) -> None:
        """Find every linear layer's weight in every expert, by name and shape, from the headers.

        Raises:
            EPMQInputError: per expert, every weight that is missing, of another shape, or not a
                floating tensor.
        """
        problems: dict[str, list[str]] = {name: [] for name in self._checkpoints}
        for linear in linears:
            for name, checkpoint in self._checkpoints.items():
                tensor = next((t for t in linear.tensors if t in checkpoint), None)
                if tensor is None:
                    problems[name].append(f"`{linear.tensors[0]}` is missing")
                    continue
                info = checkpoint.info(tensor)
                if info.shape != linear.shape:
                    problems[name].append(
                        f"`{tensor}` has shape {info.shape}, the merged model has {linear.shape}"
                    )
                elif info.torch_dtype is None:
                    problems[name].append(f"`{tensor}` has dtype {info.dtype}, not a floating one")
                self._tensors[name, linear.name] = tensor
        for name, found in problems.items():
            if found:
                more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
                raise EPMQInputError(
                    f"expert `{name}` ({self.sources[name].name}) does not fit the merged model: "
                    + "; ".join(found[:_LISTED])
                    + more
                    + ". An expert must hold every linear layer of the merged model, fine-tuned "
                    "from the same base."
                )

    def read(self, expert: str, module: str) -> torch.Tensor:
        """One expert's weight of one linear layer, as stored, on the CPU, unchecked."""
        with self._lock:
            return self._checkpoints[expert].read(self._tensors[expert, module])

    def check(self, expert: str, module: str) -> None:
        """Raise :class:`EPMQNumericalError` if that weight holds a NaN or an infinity."""
        tensor = self._tensors[expert, module]
        check_finite(
            self.read(expert, module),
            f"expert `{expert}`: tensor `{tensor}`",
            module=module,
            expert=expert,
        )

    def close(self) -> None:
        """Release the memory-mapped shards."""
        for checkpoint in self._checkpoints.values():
            checkpoint.close()


def check_finite(
    tensor: torch.Tensor, what: str, *, module: str | None = None, expert: str | None = None
) -> None:
    """Raise :class:`EPMQNumericalError` naming the count and first index of non-finite entries."""
    # One reduction in the common case: a sum of finite fp32 values can overflow, so it only
    # clears; what it does not clear is looked at entry by entry.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count == 0:
        return
    first = tuple(bad.nonzero()[0].tolist())
    raise EPMQNumericalError(
        f"{what} holds {count} non-finite value{'s' if count > 1 else ''}, the first at index "
        f"{first}.",
        module=module,
        expert=expert,
    )
