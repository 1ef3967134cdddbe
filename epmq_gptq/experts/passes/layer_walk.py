"""Rows through one layer at a time, with nothing known of the layer but that it is called.

To run layer l for a batch, the model's own forward runs with the layers before l replaced by what
layer l - 1 returned earlier, and stops behind l. So masks, position embeddings, position biases and
the encoder's states are always the model's own; only the embeddings are computed again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...calibration.batches import split_rows
from ...errors import EPMQInputError, EPMQNumericalError
from .skeleton import LayerStack

Batch = Mapping[str, Tensor]
# What a decoder's layer calls the tokens of the other stack.
_MEMORY = "encoder_hidden_states"


class _Stop(Exception):
    """Thrown behind the layer that was to run."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class LayerWalk:
    """The rows of a merge on their way through the layers.

    What is kept of a batch is what the last layer returned, on the CPU; of an encoder also its
    last layer's, for the decoder. Tensors that many batches share (position biases) are kept once.

    Args:
        batches: arguments of a forward, masks as in ``CalibrationPlan``.
        device: of the parameters.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device):
        self.batches = batches
        self._device = device
        self._outputs: dict[str, list[Any]] = {}  # path of a stack → batch → what its layer gave
        self._shared: dict[Any, Tensor] = {}

    @contextlib.contextmanager
    def at(
        self, stacks: Sequence[LayerStack], stack: LayerStack, index: int
    ) -> Iterator[Callable[[int], Any]]:
        """Within: ``run(batch) -> output of layer index of stack``, for the batch of a number.

        The layer's parameters, and those outside of the stacks, must be there by then.
        """
        layer = stack.layers[index]
        earlier = [s for s in stacks[: stacks.index(stack)] if s.is_read]
        stubbed = [(s, s.layers) for s in earlier] + [(stack, stack.layers[:index])]
        current: dict[str, Any] = {}

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            raise _Stop(output)

        def run(batch: int) -> Any:
            for one, layers in stubbed:
                if layers:
                    current[one.path] = _moved(self._outputs[one.path][batch], self._device)
            inputs = {
                key: self.batches[batch][key].to(self._device)
                for key in stack.inputs
                if key in self.batches[batch]
            }
            try:
                stack.root(**inputs, **stack.options)
            except _Stop as stopped:
                return stopped.output
            raise EPMQInputError(
                f"`{stack.name(index)}`: the model's forward does not run this layer.",
                code="EPMQ-F38",
                subject=f"layer `{stack.name(index)}`",
                remedy="Use a method that takes no calibration.",
            )

        with contextlib.ExitStack() as undo:
            for one, layers in stubbed:
                for module in layers:
                    module.forward = _stub(current, one.path)
                    undo.callback(delattr, module, "forward")
            undo.callback(layer.register_forward_hook(stop).remove)
            yield run

    def keep(self, stack: LayerStack, batch: int, output: Any) -> None:
        """What the next layer of the stack is given for a batch."""
        kept = self._outputs.setdefault(stack.path, [None] * len(self.batches))
        first, *others = output if isinstance(output, tuple) else (output,)
        rest = [self._share(other) for other in others]
        first = first.detach().cpu()
        kept[batch] = (first, *rest) if isinstance(output, tuple) else first

    def _share(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            # A cache or the like would be wrong for the next layer; None is the usual thing here.
            return None
        value = value.detach().cpu()
        known = self._shared.setdefault((tuple(value.shape), _fingerprint(value)), value)
        return known if torch.equal(known, value) else value

    def state(self) -> dict[str, Any]:
        """What is kept of all batches, every tensor once: numbers stand for their places."""
        tensors: list[Tensor] = []
        places: dict[int, int] = {}

        def place(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(place(part) for part in value)
            if value is None:
                return None
            if id(value) not in places:
                places[id(value)] = len(tensors)
                tensors.append(value)
            return places[id(value)]

        outputs = {path: [place(one) for one in each] for path, each in self._outputs.items()}
        return {"tensors": tensors, "outputs": outputs}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        tensors = state["tensors"]

        def value(place: Any) -> Any:
            if isinstance(place, tuple):
                first, *others = place
                return (value(first), *(self._share(value(other)) for other in others))
            return None if place is None else tensors[place]

        self._outputs = {path: list(map(value, each)) for path, each in state["outputs"].items()}

    def leave(self, stack: LayerStack) -> None:
        """Forget what no later stack reads."""
        if not stack.is_read:
            self._outputs.pop(stack.path, None)
            self._shared.clear()


def split_state(state: Mapping[str, Any], pieces: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A :meth:`LayerWalk.state` for smaller batches.

    Args:
        state: of a walk over the former batches.
        pieces: former batch → rows of each batch that it was split into.
    """
    tensors = list(state["tensors"])

    def split(place: Any, sizes: Sequence[int]) -> list[Any]:
        if isinstance(place, tuple):
            return list(zip(*(split(one, sizes) for one in place), strict=True))
        parts = [] if place is None else split_rows(tensors[place], sizes)
        if not parts or parts[0] is tensors[place]:
            return [place] * len(sizes)
        tensors.extend(parts)
        return list(range(len(tensors) - len(parts), len(tensors)))

    outputs = {
        path: [
            part for place, sizes in zip(each, pieces, strict=True) for part in split(place, sizes)
        ]
        for path, each in state["outputs"].items()
    }
    return {"tensors": tensors, "outputs": outputs}


def _fingerprint(value: Tensor) -> float:
    return float(value.double().sum()) if value.is_floating_point() else 0.0


def _stub(current: Mapping[str, Any], path: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: current[path]


def _moved(output: Any, device: torch.device) -> Any:
    if not isinstance(output, tuple):
        # A copy also on the CPU: a layer may add to its input in place.
        return output.to(device, copy=True)
    first, *others = output
    rest = [other.to(device) if isinstance(other, Tensor) else other for other in others]
    return (_moved(first, device), *rest)


# ---- inputs of the linear layers -----------------------------------------------------------------


@dataclass
class InputGram:
    """Of linear layers that were always given one and the same tensor.

    Attributes:
        layers: their full names.
        gram: X X^T over all tokens, (in, in), fp64.
        tokens: how many columns X has; padding left out.
    """

    layers: tuple[str, ...]
    gram: Tensor
    tokens: int


class _Seen(NamedTuple):
    """An input in the batch that runs."""

    x: Tensor  # kept, so that no later tensor of the batch can be mistaken for it
    layers: list[str]
    gram: Tensor
    tokens: int


class InputGrams:
    """Grams of what the linear layers within a layer are given, one for each shared input.

    Use as a context; :meth:`begin` comes before each batch and :meth:`end` after it.

    Args:
        stack: of the layer.
        index: of the layer.
    """

    def __init__(self, stack: LayerStack, index: int):
        self._stack = stack
        self._index = index
        self._mask: Tensor | None = None
        self._memory_mask: Tensor | None = None
        self._memory: Tensor | None = None
        self._batch: list[_Seen] = []
        self._grams: dict[tuple[str, ...], InputGram] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> InputGrams:
        layer = self._stack.layers[self._index]
        names = [*inspect.signature(type(layer).forward).parameters][1:]  # without self
        place = names.index(_MEMORY) if _MEMORY in names else None

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            has_place = place is not None and place < len(args)
            self._memory = args[place] if has_place else kwargs.get(_MEMORY)

        hook = layer.register_forward_pre_hook(before, with_kwargs=True)
        self._undo.callback(hook.remove)
        for name, module in self._stack.linears(self._index).items():
            self._undo.callback(module.register_forward_pre_hook(self._catch(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def begin(self, batch: Batch) -> None:
        """The masks of the batch that comes."""
        self._mask = self._masked(batch, self._stack.mask)
        self._memory_mask = self._masked(batch, self._stack.memory_mask)

    @staticmethod
    def _masked(batch: Batch, key: str | None) -> Tensor | None:
        mask = batch.get(key) if key is not None else None
        # Where nothing is hidden there is nothing to find out about a layer's tokens.
        return None if mask is None or bool(mask.bool().all()) else mask.bool().reshape(-1)

    def _catch(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0]
            for seen in self._batch:
                if seen.x is x:
                    seen.layers.append(name)
                    return
            rows = self._rows(x, name)
            # fp32 products of one batch, fp64 sums of many.
            gram = (rows.T @ rows).to(torch.float64)
            self._batch.append(_Seen(x, [name], gram, len(rows)))

        return hook

    def _rows(self, x: Tensor, name: str) -> Tensor:
        """The tokens of x: (..., in) that are none of padding, (tokens, in)."""
        memory = self._memory
        of_memory = (
            memory is not None and x.shape == memory.shape and x.data_ptr() == memory.data_ptr()
        )
        mask = self._memory_mask if of_memory else self._mask
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if mask is None:
            return rows
        if mask.numel() != len(rows):
            raise EPMQInputError(
                f"layer `{name}` is given {len(rows)} tokens of a batch of {mask.numel()}, and "
                "which of them are padding cannot be told.",
                code="EPMQ-F38",
                subject=f"layer `{name}`",
                remedy="Use a `batch_size` of 1.",
            )
        return rows[mask.to(rows.device)]

    def end(self) -> None:
        """Add what the batch gave."""
        for seen in self._batch:
            key = tuple(seen.layers)
            if key in self._grams:
                self._grams[key].gram += seen.gram
                self._grams[key].tokens += seen.tokens
            else:
                self._grams[key] = InputGram(key, seen.gram, seen.tokens)
        self._batch = []
        self._memory = None

    def result(self, expert: str) -> list[InputGram]:
        """The Grams of all batches so far.

        Raises:
            EPMQNumericalError: one is not finite.
            EPMQInputError: a layer shared its input with others in some batches only.
        """
        seen: set[str] = set()
        for layers, one in self._grams.items():
            if not torch.isfinite(one.gram).all():
                raise EPMQNumericalError(
                    f"expert `{expert}`: the inputs of layer `{layers[0]}` are not finite.",
                    code="EPMQ-F27",
                    subject=f"layer `{layers[0]}`",
                    remedy="Look at the expert's calibration rows, and at its weights before this "
                    "layer.",
                    module=layers[0],
                    expert=expert,
                )
            if seen.intersection(layers):
                raise EPMQInputError(
                    f"layer `{layers[0]}` does not share its input with the same layers in every "
                    "batch.",
                    code="EPMQ-F38",
                    subject=f"layer `{layers[0]}`",
                    remedy="Use a method that takes no calibration.",
                )
            seen.update(layers)
        return list(self._grams.values())
