"""Calibration rows per expert → batches that each belong to exactly one expert.

The host sorts, concatenates and drops rows of one flat list; a row must never lose its expert, so
every expert's rows are prepared apart and the batches carry the expert's name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import EPMQInputError

# (rows, batch_size) -> batches {"input_ids": (B, S), "attention_mask": (B, S)}
PrepareRows = Callable[[list, int], list[dict[str, torch.Tensor]]]


@dataclass
class CalibrationPlan:
    """The batches of a run, in order, and the expert each belongs to.

    Attributes:
        batches: the host's batches: ``input_ids`` and ``attention_mask``, ``(B, S)`` each.
        experts: the expert of each batch.
        rows: calibration rows per expert.
        tokens: calibration tokens per expert, padding left out.
        cut: rows per expert that were longer than the model's context and were cut to it.
    """

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.rows.values())


def plan_calibration(
    calibration: Mapping[str, Iterable[Any]],
    experts: Sequence[str],
    prepare: PrepareRows,
    *,
    batch_size: int,
    pad: bool = True,
    context: int | None = None,
    keep_end: bool = False,
) -> CalibrationPlan:
    """Batch every expert's rows apart, experts in the given order.

    Args:
        calibration: expert → rows (strings, token ids, ``{"text": …}``, ``{"messages": …}``,
            ``{"input_ids": …, "attention_mask": …}``).
        experts: the experts of the run.
        prepare: tokenises and batches rows, the host's way.
        batch_size: rows per batch.
        pad: whether rows of different lengths may share a batch. Without, only rows of one length
            do: routed modules see no attention mask, so a padding token would count as data there.
        context: the most tokens the model takes; longer rows are cut, with a warning.
        keep_end: cut the beginning of a row instead of its end (for padding on the left).

    Raises:
        EPMQInputError: the names are not those of the experts, or an expert has no usable row.
    """
    _check_plan(calibration, experts, batch_size)
    plan = CalibrationPlan()
    for name in experts:
        rows = _rows(calibration[name], name)
        try:
            batches = prepare(rows, batch_size if pad else 1)
        except EPMQInputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise EPMQInputError(f"calibration of expert `{name}`: {error}") from error
        if context is not None:
            plan.cut[name] = sum(_cut(batch, context, keep_end) for batch in batches)
        if not pad:
            batches = list(_equal_lengths(batches, batch_size))
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        kept = sum(batch["input_ids"].shape[0] for batch in batches)
        if tokens == 0 or kept != len(rows):
            raise EPMQInputError(
                f"calibration of expert `{name}`: {len(rows)} rows gave {kept} usable ones with "
                f"{tokens} tokens; every row must hold at least one token."
            )
        if plan.cut.get(name):
            warnings.warn(
                f"calibration of expert `{name}`: {plan.cut[name]} of {kept} rows were cut to the "
                f"model's {context} tokens.",
                stacklevel=2,
            )
        plan.batches += batches
        plan.experts += [name] * len(batches)
        plan.rows[name], plan.tokens[name] = kept, tokens
    return plan


def _check_plan(calibration: Any, experts: Sequence[str], batch_size: Any) -> None:
    if not isinstance(calibration, Mapping):
        raise EPMQInputError(
            "`calibration` should map every expert's name to its rows "
            f'(`model.quantize({{"{experts[0]}": rows, …}})`), got {type(calibration).__name__}.'
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise EPMQInputError(f"`batch_size` should be a positive integer, got {batch_size!r}.")
    missing = [name for name in experts if name not in calibration]
    unknown = [name for name in calibration if name not in experts]
    if missing or unknown:
        raise EPMQInputError(
            "`calibration` and `experts` must name the same experts: calibration has "
            f"{sorted(calibration)}, experts has {sorted(experts)}"
            + (f"; without rows: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
            + "."
        )


def _rows(rows: Any, name: str) -> list:
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise EPMQInputError(
            f"calibration of expert `{name}` should be a list of rows, got {type(rows).__name__}."
        )
    rows = list(rows)
    if not rows:
        raise EPMQInputError(
            f"calibration of expert `{name}` is empty; give rows of that expert's own task."
        )
    return rows


def _cut(batch: dict[str, torch.Tensor], context: int, keep_end: bool) -> int:
    """Cut a batch to ``context`` tokens in place; returns how many of its rows were longer."""
    if batch["input_ids"].shape[1] <= context:
        return 0
    longer = int((batch["attention_mask"].sum(1) > context).sum())
    for key, tensor in batch.items():
        batch[key] = tensor[:, -context:] if keep_end else tensor[:, :context]
    return longer


def _equal_lengths(
    batches: list[dict[str, torch.Tensor]], batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    by_length: dict[int, list[dict[str, torch.Tensor]]] = {}
    for batch in batches:
        by_length.setdefault(batch["input_ids"].shape[1], []).append(batch)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            yield {key: torch.cat([row[key] for row in chunk]) for key in chunk[0]}
