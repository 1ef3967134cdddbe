"""What every merge method is made of: its options, and one tensor of all models as blocks.

Notation: theta_0 is the base, theta_i expert i of K, tau_i = theta_i - theta_0 its task vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import EPMQInputError, EPMQNumericalError

# Entries of one block. 4 Mi entries are 16 MB in fp32: the temporaries of K = 8 experts stay under
# half a gigabyte, and a block of 1024 rows of width 4096 still fills a matrix product.
BLOCK = 1 << 22


# ---- options -----------------------------------------------------------------------------------


def option(default: Any, *, doc: str, rule: str, check: Callable[[Any], bool]) -> Any:
    """A dataclass field that carries its documentation and the rule its value must obey."""
    return field(default=default, metadata={"doc": doc, "rule": rule, "check": check})


def is_number(value: Any) -> bool:
    """A finite int or float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge K experts. A subclass is one method; its fields are its options.

    Attributes:
        name: how the registry, the CLI and the record call it.
        title: of the paper.
        reference_url: of the paper.
        needs_base: whether theta_0 enters the formula.
        needs_calibration: whether it runs rows of the experts through their layers.
        passes: how often every tensor of every model is read, the merge itself included.

    Raises:
        EPMQInputError: an option breaks its rule.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference_url: ClassVar[str]
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not entry.metadata["check"](value):
                raise EPMQInputError(
                    f"`{entry.name}` should be {entry.metadata['rule']}, got {value!r}.",
                    code="EPMQ-O01",
                    subject=f"`{entry.name}`",
                    remedy=f"Leave it out for the default of `{self.name}`, {entry.default!r}.",
                )
            if isinstance(entry.default, float):
                # 1 and 1.0 are one setting, also in the record.
                object.__setattr__(self, entry.name, float(value))

    def parameters(self) -> dict[str, Any]:
        """The options as plain data, for the record."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}

    def check_experts(self, names: Sequence[str]) -> None:
        """Raise EPMQInputError if an option does not fit the experts of this run."""

    def prepare(self, each: Callable[[Callable[[Stack], None]], None]) -> Any:
        """What :meth:`merge` needs to know of the whole model; ``each(visit)`` is one pass."""
        return None

    def merge(self, stack: Stack, state: Any) -> Tensor:
        """The merged tensor, in ``stack.dtype``; ``state`` is what :meth:`prepare` returned."""
        raise NotImplementedError


# ---- one tensor of all models ------------------------------------------------------------------


class Block(NamedTuple):
    """Rows of one tensor in all models, in fp32."""

    rows: slice
    base: Tensor | None  # (rows, ...)
    experts: list[Tensor]  # K of (rows, ...)

    def task_vectors(self) -> list[Tensor]:
        """tau_i = theta_i - theta_0, K of (rows, ...)."""
        assert self.base is not None
        return [expert - self.base for expert in self.experts]


@dataclass(frozen=True)
class Stack:
    """One tensor name in the base and in all experts, as stored.

    Attributes:
        name: of the tensor.
        base: theta_0, or None for a method that needs none.
        experts: expert name → theta_i, all of one shape.
        dtype: of the merged tensor.
        device: where the blocks are computed.
    """

    name: str
    base: Tensor | None
    experts: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """The shape that all models share."""
        return next(iter(self.experts.values())).shape

    def _slices(self) -> Iterator[slice]:
        length = self.shape[0] if self.shape else 1
        step = max(1, BLOCK // max(1, math.prod(self.shape[1:])))
        for start in range(0, length if math.prod(self.shape) else 0, step):
            yield slice(start, min(start + step, length))

    def _cut(self, tensor: Tensor, rows: slice) -> Tensor:
        return tensor.detach().reshape(tensor.shape or (1,))[rows].to(self.device, torch.float32)

    def blocks(self) -> Iterator[Block]:
        """The tensor in runs of rows of at most BLOCK entries (or one row), in fp32."""
        for rows in self._slices():
            base = None if self.base is None else self._cut(self.base, rows)
            yield Block(rows, base, [self._cut(expert, rows) for expert in self.experts.values()])

    def map(self, formula: Callable[[Block], Tensor]) -> Tensor:
        """The tensor whose rows are ``formula(block)``, rounded to ``dtype``, on the CPU.

        Raises:
            EPMQNumericalError: the result does not fit in ``dtype``.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        rows_of_out = out.reshape(self.shape or (1,))
        for block in self.blocks():
            rows_of_out[block.rows] = formula(block).to("cpu", self.dtype)
            self._check(rows_of_out, block.rows, f"merged tensor `{self.name}`", None)
        return out

    def check_finite(self) -> None:
        """Raise EPMQNumericalError at the first NaN or Inf of the base or an expert."""
        models = [] if self.base is None else [(None, self.base)]
        for expert, tensor in [*models, *self.experts.items()]:
            what = "base" if expert is None else f"expert `{expert}`"
            for rows in self._slices():
                cut = tensor.detach().reshape(tensor.shape or (1,))
                self._check(cut, rows, f"{what}: tensor `{self.name}`", expert)

    def _check(self, tensor: Tensor, rows: slice, what: str, expert: str | None) -> None:
        finite = torch.isfinite(tensor[rows])
        if finite.all():
            return
        index = (~finite).nonzero()[0].tolist()
        index[0] += rows.start
        merged = what.startswith("merged")
        raise EPMQNumericalError(
            f"{what} is not finite: {tensor[tuple(index)].item()} at index {index}.",
            code="EPMQ-F09" if merged else "EPMQ-F08",
            subject=f"tensor `{self.name}`",
            remedy=f"It left the range of {self.dtype}; lower the scale or use a wider base dtype."
            if merged
            else "Train or save that model again; a merge would spread it.",
            module=self.name,
            expert=expert,
        )


# ---- arithmetic that the methods share ---------------------------------------------------------


def add_up(tensors: Sequence[Tensor]) -> Tensor:
    """Sum from the first to the last.

    ``torch.sum`` over a stack may group its terms by position, so that a block and the whole tensor
    could differ in the last bit, and TIES' election with them. This order depends on nothing.
    """
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def add_update(base: Tensor, update: Tensor) -> Tensor:
    """theta_0 + update, where an update of zero leaves theta_0 bit for bit (-0.0 + 0.0 is 0.0)."""
    return torch.where(update == 0, base, base + update)
