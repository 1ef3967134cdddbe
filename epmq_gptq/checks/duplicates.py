"""Which models have the very same linear weights, found with as few reads as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..experts.linears import Linear
from .findings import Finding, listed
from .weights import BASE, MERGED, Models, Rows

# Bytes of fp32 rows that are compared first; two models that differ do so almost anywhere.
_FIRST_BYTES = 1_000_000


def equal_models(models: Models, linears: Sequence[Linear]) -> list[list[str]]:
    """Classes of two or more models whose linear layers are all equal.

    All models start in one class. One block of rows after the other is read and splits the classes
    whose members differ there; a model that is alone is not read any more. So models that differ
    cost one block, and only equal ones are read to the end.

    Values are compared, not files: a copy in another dtype that lost nothing is equal.

    Args:
        models: what to compare.
        linears: in forward order.

    Returns:
        The classes with more than one member, each in the order of ``models.names``.
    """
    # One folder under two names is equal unread: the first name stands for the others.
    same: dict[str, list[str]] = {}
    for name in models.names:
        first = next((first for first in same if models.is_same_source(first, name)), name)
        same.setdefault(first, []).append(name)
    classes = [list(same)] if len(same) > 1 else []
    for rows in _order(linears):
        if not classes:
            break
        classes = [part for group in classes for part in _split(models, group, rows)]
    alone = set(same).difference(*classes)
    classes += [[first] for first in same if first in alone and len(same[first]) > 1]
    order = models.names.index
    return [sorted((name for first in each for name in same[first]), key=order) for each in classes]


def _order(linears: Sequence[Linear]) -> Iterator[Rows]:
    # The middle first: many fine-tunes leave the first layers as they are. Of every layer the
    # first rows before all the rest: an adapter changes some layers only, but there every row.
    middle = len(linears) // 2
    order = [*linears[middle:], *linears[:middle]]
    stops = [min(li.outputs, max(1, _FIRST_BYTES // (4 * li.inputs))) for li in order]
    for linear, stop in zip(order, stops, strict=True):
        yield Rows(linear, 0, stop)
    for linear, stop in zip(order, stops, strict=True):
        for start in range(stop, linear.outputs, 8 * stop):
            yield Rows(linear, start, min(start + 8 * stop, linear.outputs))


def _split(models: Models, group: list[str], rows: Rows) -> list[list[str]]:
    parts: list[tuple[torch.Tensor, list[str]]] = []
    for name in group:
        W = models.rows(name, rows)
        # −0.0 equals 0.0 here, and NaN nothing, itself neither: such a weight is no equal's.
        alike = next((names for other, names in parts if torch.equal(W, other)), None)
        if alike is None:
            parts.append((W, [name]))
        else:
            alike.append(name)
    return [names for _, names in parts if len(names) > 1]


def check_duplicates(
    classes: Sequence[Sequence[str]], *, allow_duplicates: bool = False
) -> Iterator[Finding]:
    """F17: experts that are one model. F18: experts that equal the base or the merge."""
    for group in classes:
        experts = [name for name in group if name not in (MERGED, BASE)]
        if len(experts) > 1:
            yield Finding(
                "note" if allow_duplicates else "error",
                "EPMQ-F17",
                "experts " + listed(experts),
                f"the experts {listed(experts)} have the same weights in every linear layer, so "
                "that one model would count more than once.",
                "Leave out all but one of them, or set `allow_duplicates` if that is meant.",
            )
        for known, meaning in (
            (MERGED, "it pulls towards the merge and adds nothing else"),
            (BASE, "it is the model before fine-tuning"),
        ):
            if known in group:
                for name in experts:
                    yield Finding(
                        "note",
                        "EPMQ-F18",
                        f"expert `{name}`",
                        f"expert `{name}` equals {known} in every linear layer: {meaning}.",
                    )
