"""Whose the calibration is: the names of the experts, and the sources that are given for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.options import documented, from_mapping
from .row_forms import ROW_KEYS
from .rows import DATA_FREE, JSON_LINES, PARQUET, RowSource, TaggedSource, is_data_free

# What a recipe's `calibration` holds once it was checked.
CalibrationBlock = TaggedSource | dict[str, list[RowSource] | str]


def recipe_calibration(value: Any, experts: Sequence[str]) -> CalibrationBlock:
    """Check the ``calibration`` of a recipe: expert → sources or ``data_free``, or a tagged source.

    Raises:
        EPMQInputError: the experts' names are others, or an option of a source is refused.
    """
    if isinstance(value, Mapping) and "expert_column" in value:
        value = from_mapping(TaggedSource, value, "`calibration`")
    if isinstance(value, TaggedSource):
        value.check_experts(experts)
        check_some_rows([name for name in experts if name not in value.data_free])
        return value
    check_names(value, experts)
    block = {
        name: DATA_FREE if is_data_free(value[name]) else _sources(value[name], name)
        for name in experts
    }
    check_some_rows([name for name, sources in block.items() if sources != DATA_FREE])
    return block


def _sources(value: Any, expert: str) -> list[RowSource]:
    what = f"`calibration.{expert}`"
    values = value if isinstance(value, list) else [value]
    if not values or any(map(is_data_free, values)):
        raise EPMQInputError(
            f"{what} is empty." if not values else f"{what} has `data_free` in a list.",
            code="EPMQ-F22",
            subject=f"expert `{expert}`",
            remedy="Give rows of that expert's own task, or `data_free` in their place.",
        )
    if len(values) == 1:
        places = [what]
    else:
        places = [f"`calibration.{expert}[{i}]`" for i in range(len(values))]
    return [
        item if type(item) is RowSource else RowSource.from_option(item, place)
        for item, place in zip(values, places, strict=True)
    ]


# ---- a call from Python ------------------------------------------------------------------------


def experts_with_rows(
    calibration: Any, experts: Sequence[str], data_free: Sequence[str]
) -> list[str]:
    """The experts that should have rows, and have them."""
    if isinstance(calibration, Mapping):
        for name, value in calibration.items():
            if name in experts:
                check_data_free(name, is_data_free(value), name in data_free)
        calibration = {k: v for k, v in calibration.items() if not is_data_free(v)}
    named = [name for name in experts if name not in data_free]
    check_names(calibration, named)
    check_some_rows(named)
    return named


def check_data_free(expert: str, given: bool, option: bool) -> None:
    """Refuse a calibration and an option ``data_free`` that contradict each other.

    Raises:
        EPMQInputError: one of them says that the expert has no rows, and the other that it has.
    """
    if given != option:
        has = "is `data_free`" if given else "has rows"
        other = "does not name it" if given else "names it as well"
        raise EPMQInputError(
            f"`calibration` of expert `{expert}` {has}, and the option `data_free` {other}.",
            code="EPMQ-O03",
            subject=f"expert `{expert}`",
            remedy="Say the same in both.",
        )


def given_sources(value: Any, expert: str) -> list[RowSource]:
    """The sources that a Python caller may mean."""
    what = f"calibration of expert `{expert}`"
    if value is None:
        raise EPMQInputError(
            f"{what} should be rows, got None.",
            code="EPMQ-F22",
            subject=f"expert `{expert}`",
            remedy="Give rows of that expert's own task.",
        )
    if isinstance(value, Mapping):
        _check_options(value, what, expert)
    if isinstance(value, (str, Path, Mapping)) or type(value) is RowSource:
        return [_source(value, what)]
    if isinstance(value, (list, tuple)) and value:
        if all(map(_is_source, value)):
            return [_source(each, what) for each in value]
        _check_no_names(value, what, expert)
    return [RowSource(rows=value)]


def _check_options(value: Mapping, what: str, expert: str) -> None:
    """A row, a tokenizer's batch and a dataset's splits are mappings too."""
    splits = any(hasattr(each, "column_names") for each in value.values())
    if "rows" not in value and (splits or set(ROW_KEYS) & set(value)):
        remedy = "Give one of its splits." if splits else "Put the rows, a mapping each, in a list."
        raise EPMQInputError(
            f"{what} is a mapping of {listed(map(str, value))}, where rows should be.",
            code="EPMQ-F32",
            subject=f"expert `{expert}`",
            remedy=remedy,
        )


def _is_source(value: Any) -> bool:
    """Whether what is in a list says where rows are and is no row."""
    if isinstance(value, Mapping):
        return not set(ROW_KEYS) & set(value) and bool(set(documented(RowSource)) & set(value))
    return type(value) is RowSource or isinstance(value, Path)


def _source(value: Any, what: str) -> RowSource:
    if type(value) is RowSource:
        return value
    return RowSource.from_option(str(value) if isinstance(value, Path) else value, what)


def _check_no_names(rows: Sequence[Any], what: str, expert: str) -> None:
    """Names of files in a list would be read as texts, in a recipe they are files."""
    names = [row for row in rows if isinstance(row, str) and len(row.split()) == 1]
    files = [name for name in names if Path(name).suffix.lower() in (*JSON_LINES, *PARQUET, ".txt")]
    if len(files) == len(rows) or is_data_free(rows[0]):
        raise EPMQInputError(
            f"{what}: the rows should be texts, got `{Path(rows[0]).name[:80]}`.",
            code="EPMQ-F32",
            subject=f"expert `{expert}`",
            remedy="In a list a file is a `Path`; `data_free` stands in place of the list.",
        )


# ---- the names ---------------------------------------------------------------------------------


def check_names(calibration: Any, experts: Sequence[str]) -> None:
    """Refuse anything but a mapping that has exactly the ``experts`` as its keys.

    Raises:
        EPMQInputError: naming both sets.
    """
    if not isinstance(calibration, Mapping):
        name = next(iter(experts), "math")
        raise EPMQInputError(
            "`calibration` should map every expert's name to its rows, got "
            f"{type(calibration).__name__}.",
            code="EPMQ-F21",
            subject="`calibration`",
            remedy=f'Write `{{"{name}": rows, …}}`, or name the column that holds the expert with '
            "`expert_column`.",
        )
    missing = [name for name in experts if name not in calibration]
    unknown = [str(name)[:80] for name in calibration if name not in experts]
    if missing or unknown:
        both = f"calibration has {listed(map(str, calibration))}, experts has {listed(experts)}"
        raise EPMQInputError(
            f"`calibration` and `experts` should name the same experts: {both}"
            + (f"; without rows: {listed(missing)}" if missing else "")
            + (f"; not an expert: {listed(unknown)}" if unknown else "")
            + ".",
            code="EPMQ-F21",
            subject="`calibration`",
            remedy="Give every expert rows under its own name, or `data_free` in their place.",
        )


def check_some_rows(names: Sequence[str]) -> None:
    """Refuse a calibration without rows of anybody.

    Raises:
        EPMQInputError: ``names``, the experts that have rows, is empty.
    """
    if not names:
        raise EPMQInputError(
            "`calibration` is `data_free` for every expert: activations must come from somewhere.",
            code="EPMQ-F22",
            subject="`calibration`",
            remedy="Give rows for at least one expert.",
        )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in an error, however many."""
    names = [name[:80] for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
