"""Calibration in any of its forms → the rows of every expert: checked, drawn and counted.

Reading needs no model. What comes next, tokens and pixels, is in ``text.py``, ``images.py`` and
``pairs.py``; batches are in ``batches.py``.
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.declared import bad_option, conflict, is_count, shown
from .readers import Found, find_rows
from .rows import TEXT, Row, RowForm, Where
from .sources import RowSource, TaggedSource, listed, python_calibration


@dataclass(frozen=True)
class RowSet:
    """The rows that were taken from one source.

    Attributes:
        source: where they came from.
        rows: in the order of the source; with ``concat`` and ``samples``, all of them in the order
            of the draw, to be read until the blocks are full.
        available: how many the source has for this expert, blank ones of a dataset included.
        blank: how many of a dataset's were passed over.
    """

    source: RowSource
    rows: Iterable[Row]
    available: int
    blank: int = 0

    @property
    def taken(self) -> str:
        """In a few words: what was asked for, what there is, where."""
        source = self.source
        if source.concat:
            count = "all" if source.samples is None else source.samples
            blocks = f"{count} blocks of {source.limit} tokens from {self.available} rows"
            return f"{blocks} ({source.label})"
        return f"{sum(1 for _ in self.rows)} of {self.available} ({source.label})"


@dataclass(frozen=True)
class _InOrder:
    """The rows of a large table in a given order, blank ones left out, read one by one."""

    found: Found
    order: Sequence[int]

    def __iter__(self) -> Iterator[Row]:
        return (row for row in map(self.found.row, self.order) if row is not None)


def read_calibration(
    calibration: Any,
    experts: Sequence[str],
    *,
    data_free: Sequence[str] = (),
    seed: int = 0,
    folder: Path = Path(),
    concat_size: int | None = None,
    form: RowForm = TEXT,
) -> dict[str, list[RowSet]]:
    """Read the rows of every expert; the counts asked for are the counts returned.

    Args:
        calibration: expert → a list of rows (strings, token ids, mappings with ``text``,
            ``messages`` or ``input_ids``; or what ``form`` says), a ``datasets.Dataset``, a
            file's name, the options of a ``RowSource``, one of these or a list
            of them (in a list, files are ``Path``: strings are rows of text); or one source for all
            experts, with ``expert_column``. What a recipe holds is one of these.
        experts: the experts of the run.
        data_free: those of them that have no rows.
        seed: of the draws: the same seed draws the same rows, on any machine.
        folder: what relative paths are relative to.
        concat_size: join the rows of every source into blocks of so many tokens.
        form: what a row is for the merged model, see :func:`~epmq_gptq.calibration.rows.form_of`.

    Returns:
        Expert → its sources, in the order of ``experts``; the data-free ones are left out.

    Raises:
        EPMQInputError: the names differ, a source cannot be read, holds something else than rows
            or has too few.
    """
    block = python_calibration(calibration, experts, data_free)
    if isinstance(block, TaggedSource):
        named = [name for name in experts if name not in data_free]
        return _read_tagged(_in_blocks(block, concat_size), named, seed, folder, form)
    return {
        name: [
            _read(_in_blocks(source, concat_size), name, seed, index, folder, form)
            for index, source in enumerate(sources)
        ]
        for name, sources in block.items()
    }


def _in_blocks(source: RowSource, size: int | None) -> RowSource:
    if size is None:
        return source
    if not is_count(size):
        raise bad_option("calibration_concat_size", "a positive integer", size)
    if source.seqlen not in (None, size):
        cause = f"is {size}, and `seqlen` of {source.label} is {source.seqlen}"
        raise conflict("calibration_concat_size", cause, "Leave one of them out.")
    return source.model_copy(update={"concat": True, "seqlen": size})


# ---- one source --------------------------------------------------------------------------------


def _draw(source: RowSource, expert: str, seed: int, index: int = 0) -> random.Random:
    return random.Random(f"{seed if source.seed is None else source.seed}:{expert}:{index}")


def _read(
    source: RowSource, expert: str, seed: int, index: int, folder: Path, form: RowForm
) -> RowSet:
    if source.rows is not None:
        what = f"calibration of expert `{expert}`"
    else:
        what = f"`calibration.{expert}`: `{source.label}`"
    found = find_rows(source, Where(what, f"expert `{expert}`"), folder, form)
    return _chosen(found, range(len(found.data)), found.at, _draw(source, expert, seed, index))


def _chosen(found: Found, indices: Sequence[int], at: Where, draw: random.Random) -> RowSet:
    """As many of these rows as the source asks for."""
    if not indices:
        raise at.bad(*_NO_ROWS)
    if found.many:
        return _chosen_of_many(found, indices, at, draw)
    source = found.source
    # All of them, also those that are not drawn: a bad row is better known today than with
    # another seed.
    rows = [found.row(index) for index in indices]
    if source.concat:
        order = rows if source.samples is None else draw.sample(rows, len(rows))
        return RowSet(source, order, len(rows))
    wanted = len(rows) if source.samples is None else source.samples
    _check_enough(at, wanted, len(rows))
    chosen = sorted(draw.sample(range(len(rows)), wanted))
    return RowSet(source, [rows[i] for i in chosen], len(rows))


def _chosen_of_many(found: Found, indices: Sequence[int], at: Where, draw: random.Random) -> RowSet:
    source, order = found.source, list(indices)
    if source.samples is not None:
        draw.shuffle(order)
    if source.concat:
        return RowSet(source, _InOrder(found, order), len(order))
    chosen: dict[int, Row] = {}
    blank = 0
    for index in order:
        row = found.row(index)
        if row is None:  # public text sets are full of empty lines
            blank += 1
            continue
        chosen[index] = row
        if len(chosen) == source.samples:
            break
    if not chosen:
        raise at.bad(*_NO_ROWS)
    split = f" in split `{source.split or 'train'}`" if source.dataset is not None else ""
    note = split + (f" besides {blank} blank" if blank else "")
    _check_enough(at, source.samples or len(chosen), len(chosen), note)
    return RowSet(source, [chosen[index] for index in sorted(chosen)], len(order), blank)


_NO_ROWS = ("it holds no rows", "Give rows of that expert's own task.", "EPMQ-F22")


def _check_enough(at: Where, wanted: int, found: int, note: str = "") -> None:
    if found < wanted:
        cause = f"`samples` asks for {wanted} rows, there are {found}{note}"
        raise at.bad(cause, "Add rows or lower `samples`.", "EPMQ-F24")


# ---- one source for several experts ------------------------------------------------------------


def _read_tagged(
    source: TaggedSource, experts: Sequence[str], seed: int, folder: Path, form: RowForm
) -> dict[str, list[RowSet]]:
    what = "`calibration`" if source.rows is not None else f"`calibration`: `{source.label}`"
    found = find_rows(source, Where(what, "`calibration`"), folder, form)
    indices = _indices(source, found, experts)
    empty = [name for name in experts if not indices[name]]
    if empty:
        raise Where(what, f"expert `{empty[0]}`").bad(
            f"no row of column `{source.expert_column}` is of {listed(empty)}",
            "Add rows, map other values with `experts_by_value`, or name the expert under "
            "`data_free`.",
            "EPMQ-F22",
        )
    sets = {}
    for name in experts:
        own = replace(found, at=Where(what, f"expert `{name}`"))
        at = Where(f"{what}, expert `{name}`", f"expert `{name}`")
        sets[name] = [_chosen(own, indices[name], at, _draw(source, name, seed))]
    return sets


def _indices(source: TaggedSource, found: Found, experts: Sequence[str]) -> dict[str, list[int]]:
    """The rows of every expert."""
    # YAML reads `0: math` as a number; whether the column holds a number or its text is the same.
    names = {str(value): name for value, name in source.experts_by_value.items()}
    indices: dict[str, list[int]] = {name: [] for name in experts}
    others: dict[str, int] = {}
    for index, value in enumerate(_tags(source, found)):
        if isinstance(value, bool) or not isinstance(value, (str, numbers.Integral)):
            cause = f"`{source.expert_column}` should name an expert, got {shown(value)}"
            remedy = "Correct the row, or choose another `expert_column`."
            raise _column_at(found, index).bad(cause, remedy)
        name = names.get(str(value), str(value))
        if name in indices:
            indices[name].append(index)
        else:
            others[str(value)] = others.get(str(value), 0) + 1
    if others and source.other_values == "refuse":
        counts = ", ".join(f"`{value[:80]}` ({n} rows)" for value, n in list(others.items())[:20])
        raise found.at._replace(subject=f"`{source.expert_column}`").bad(
            f"column `{source.expert_column}` holds values that are none of the experts "
            f"{listed(experts)}: {counts}",
            "Map them with `experts_by_value`, or set `other_values: ignore`.",
            "EPMQ-F21",
        )
    return indices


def _tags(source: TaggedSource, found: Found) -> Iterable[Any]:
    """What the column says of every row."""
    column = source.expert_column
    if found.many:
        names = found.data.column_names
        if column not in names:
            raise _no_column(source, found.at._replace(subject="`expert_column`"), names)
        yield from found.data[column]
        return
    for index, data in enumerate(found.data):
        if not isinstance(data, Mapping) or column not in data:
            has = list(data) if isinstance(data, Mapping) else [type(data).__name__]
            raise _no_column(source, _column_at(found, index), has)
        yield data[column]


def _column_at(found: Found, index: int) -> Where:
    return found.where(index)._replace(subject="`expert_column`")


def _no_column(source: TaggedSource, where: Where, has: Iterable[Any]) -> EPMQInputError:
    cause = f"there is no `{source.expert_column}`, it has {listed(map(str, has))}"
    return where.bad(cause, "Name the column that holds the experts' names.")
