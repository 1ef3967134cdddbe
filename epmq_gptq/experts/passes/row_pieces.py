"""A layer's forward pass over some rows of its batch at a time, where memory is short.

A forward pass holds more of a batch than anything else does, and the host runs a batch whole or not
at all. Within :func:`in_row_pieces` a layer that finds no room is run over half of its rows, over a
quarter, ..., and at last over one row on the CPU. Hooks that add up what a layer is given see a
batch whole all the same, and once: see :func:`of_whole_batch`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from gptqmodel.nn_modules.hooked_linear import StopForward
from torch import Tensor, nn

from ...errors import EPMQWarning
from ...method.chunks import (
    asked_for,
    forget_cached,
    is_out_of_memory,
    leaves,
    mapped,
    moved,
    or_else,
)

Step = Callable[[Tensor], None]

# What a layer may be given besides tensors; anything else (a cache) may change as the layer runs.
_PLAIN = (type(None), bool, int, float, str)


class _Here(threading.local):
    """Of this thread."""

    batch: _Batch | None = None  # of the layer that runs
    whole = False  # whether batches must be tried whole only


_here = _Here()


class _Batch:
    """What hooks were given while a layer runs one batch, whole at first and then in pieces."""

    def __init__(self) -> None:
        self._piece: range | None = None
        self._calls: Counter[Hashable] = Counter()
        self._done: set[Hashable] = set()
        self._steps: dict[Hashable, Step] = {}
        self._parts: dict[Hashable, list[tuple[int, Tensor]]] = {}

    @property
    def is_first(self) -> bool:
        """Whether the first row of the batch is among those that run."""
        return self._piece is None or self._piece.start == 0

    def begin(self, piece: range) -> None:
        """What comes now is of these rows; what came of them before does not count."""
        self._piece = piece
        self._calls.clear()
        for parts in self._parts.values():
            parts[:] = [part for part in parts if part[0] < piece.start]

    def take(self, key: Hashable, part: Tensor, step: Step) -> None:
        call = key, self._calls[key]  # a module may be called more than once in a pass
        self._calls[key] += 1
        if self._piece is None:
            step(part)
            self._done.add(call)
        elif call not in self._done:
            self._steps[call] = step
            # Beside the pieces that come there may be no room for it on a GPU; and a stream may be
            # added to in place before it is looked at.
            part = part.detach().to("cpu", copy=True)
            self._parts.setdefault(call, []).append((self._piece.start, part))

    def finish(self, device: torch.device) -> None:
        """Give every step what was kept for it, in the order in which they came first."""
        for call, step in self._steps.items():
            parts = [part for _, part in self._parts.pop(call)]
            if parts:
                step(_back(torch.cat(parts), device))


def of_whole_batch(key: Hashable, part: Tensor, step: Step) -> None:
    """``step`` of what a hook is given for all rows of a batch.

    That is ``part`` itself, at once; where the layer runs in pieces, all parts joined by their
    first axis, behind the last of them. A piece that is tried again counts once.

    Args:
        key: of the hook: one that is equal for every piece, and for no other hook.
        part: ``(B, ...)``, or rows ``(n, ...)`` in the order of the batch.
        step: must not change ``part``.
    """
    if _here.batch is None:
        step(part)
    else:
        _here.batch.take(key, part, step)


def is_first_piece() -> bool:
    """Whether hooks now see the first row of a batch; all of them do where it runs whole."""
    return _here.batch is None or _here.batch.is_first


@contextlib.contextmanager
def whole_batches() -> Iterator[None]:
    """Within, in this thread: a batch that finds no room is not tried in pieces at first.

    For callers that have something else to try. Once some batch has needed pieces, all of them are
    run in pieces.
    """
    before, _here.whole = _here.whole, True
    try:
        yield
    finally:
        _here.whole = before


@contextlib.contextmanager
def in_row_pieces(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within: modules of these layers' classes run in pieces where their batch finds no room.

    The classes, for the host runs replicas of its layers and we run the experts' own.
    """
    limit = _Limit()
    with contextlib.ExitStack() as undo:
        for kind in dict.fromkeys(map(type, layers)):
            own = vars(kind).get("forward")
            kind.forward = _in_pieces(kind.forward, limit)
            undo.callback(_restore, kind, own)
        yield


def _restore(kind: type[nn.Module], own: Callable[..., Any] | None) -> None:
    if own is None:
        del kind.forward
    else:
        kind.forward = own


class _Limit:
    """The rows for which there was room when there was none for more; None while all fit."""

    def __init__(self) -> None:
        self.rows: int | None = None

    def lower(self, rows: int, call: _Call, error: BaseException) -> None:
        if self.rows is None:
            advice = f"A `batch_size` of {rows} is faster."
            if call.device.type == "cuda":
                advice = (
                    f"Better start again with a `batch_size` of {rows}: what a GPU short of memory "
                    "ends with is not settled (docs/reliability.md, Memory)."
                )
            warnings.warn(
                EPMQWarning(
                    f"a forward pass of {_rows(call)} rows found no memory ({asked_for(error)} "
                    f"were asked for): batches are run {rows} rows at a time from here on, or "
                    f"fewer. {advice}",
                    code="EPMQ-F46",
                ),
                stacklevel=2,
            )
        self.rows = rows
        forget_cached()


class _Result(NamedTuple):
    """One of three: what a layer returned, or what it raised."""

    output: Any = None
    stop: StopForward | None = None  # the host has seen enough of this layer
    lack: BaseException | None = None


def _in_pieces(forward: Callable[..., Any], limit: _Limit) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        if _here.batch is not None:  # a layer within a layer
            return forward(layer, *arguments, **options)
        call = _Call(functools.partial(forward, layer), arguments, options)
        rows = _rows(call)
        batch = _here.batch = _Batch()
        try:
            if limit.rows is None or rows <= limit.rows:
                result = call.tried()
                if result.lack is None or (_here.whole and limit.rows is None):
                    return _given(result)
                if rows > 1:
                    limit.lower(-(-rows // 2), call, result.lack)
            return _given(_run(layer, call, rows, batch, limit))
        finally:
            _here.batch = None

    return run


def _given(result: _Result) -> Any:
    if result.lack is not None or result.stop is not None:
        raise result.lack or result.stop
    return result.output


class _Call(NamedTuple):
    """A forward pass of a layer that is to be tried."""

    forward: Callable[..., Any]
    arguments: tuple
    options: dict[str, Any]

    def mapped(self, step: Callable[[Tensor], Tensor]) -> _Call:
        """The same of other tensors."""
        return self._replace(
            arguments=mapped(step, self.arguments), options=mapped(step, self.options)
        )

    @property
    def device(self) -> torch.device:
        """Of the first tensor that it is given."""
        return next(filter(torch.is_tensor, self.given())).device

    def given(self) -> Iterator[Any]:
        """All that its arguments hold."""
        return leaves((self.arguments, self.options))

    def tried(self) -> _Result:
        """What it returned or raised."""
        # A function, for as long as a traceback lives, so do the tensors of its frames.
        try:
            return _Result(self.forward(*self.arguments, **self.options))
        except StopForward as stop:
            return _Result(stop=stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _Result(lack=error.with_traceback(None))


def _run(layer: nn.Module, call: _Call, rows: int, batch: _Batch, limit: _Limit) -> _Result:
    """The rows in pieces of at most ``limit`` rows, or fewer where there is no room for these."""
    results: list[_Result] = []
    start = 0
    while start < rows:
        piece = range(start, min(rows, start + (limit.rows or rows)))
        batch.begin(piece)
        part = call.mapped(functools.partial(_part, rows=rows, piece=piece))
        result = part.tried()
        if result.lack is not None and len(piece) > 1:
            limit.lower(-(-len(piece) // 2), call, result.lack)
            continue
        if result.lack is not None:
            batch.begin(piece)
            result = _tried_on_cpu(layer, part) or result
        if result.lack is not None:
            return result
        results.append(result)
        start = piece.stop
    batch.finish(call.device)
    if results[-1].stop is not None:
        return results[-1]
    return _Result(_joined([result.output for result in results]))


def _tried_on_cpu(layer: nn.Module, call: _Call) -> _Result | None:
    """The same on the CPU; None where that is where it ran, or one of several devices."""
    devices = {tensor.device for tensor in (*layer.parameters(), *layer.buffers())}
    if len(devices) != 1 or devices == {torch.device("cpu")}:
        return None
    (device,) = devices
    layer.to("cpu")
    forget_cached()
    try:
        result = call.mapped(Tensor.cpu).tried()
    finally:
        layer.to(device)
    return result._replace(output=moved(result.output, device))


# ---- what a layer is given, and gives ------------------------------------------------------------


def _rows(call: _Call) -> int:
    """The rows of the batch that a layer is given; 1 where it cannot be taken apart.

    Hidden states are the first tensor of three axes. Where they have as many rows as tokens, it
    cannot be told which axis of another tensor is that of the rows.
    """
    given = list(call.given())
    states = next((one for one in given if torch.is_tensor(one) and one.dim() == 3), None)
    if states is None or states.shape[0] == states.shape[1]:
        return 1
    if not all(isinstance(one, (Tensor, *_PLAIN)) for one in given):
        return 1
    return max(1, states.shape[0])


def _part(tensor: Tensor, rows: int, piece: range) -> Tensor:
    """Some rows, where it has rows."""
    if tensor.dim() < 2 or tensor.shape[0] != rows:
        return tensor
    return tensor[piece.start : piece.stop]


def _joined(outputs: list[Any]) -> Any:
    """What the whole batch gives: tensors one behind the other, of anything plain the first."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {key: _joined([output[key] for output in outputs]) for key in first}
    if isinstance(first, (tuple, list)):
        parts = (_joined(list(each)) for each in zip(*outputs, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if not isinstance(first, _PLAIN):
        raise TypeError(f"a layer that was run in pieces returned a `{type(first).__name__}`")
    return first


def _back(tensor: Tensor, device: torch.device) -> Tensor:
    # What is counted is counted on the CPU as well.
    return or_else(lambda: tensor.to(device), lambda: tensor)
