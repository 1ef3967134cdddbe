"""Where calibration rows come from: text, JSON lines and Parquet files, ``datasets``, and memory.

Every source becomes :class:`Items`; what one of them says is checked by ``row_checks.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EPMQInputError
from .options import resolve_path, shown
from .row_checks import KINDS, Row, are_ids, bad_row, row_of
from .rows import JSON_LINES, PARQUET, RowSource, TaggedSource

# Read as text they would give rows of punctuation.
_NOT_TEXT = {".json": "json", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class Items:
    """What a source holds, before anything is chosen.

    Attributes:
        data: the rows as they were found.
        what: the source, for errors.
        subject: the expert, for errors.
        unit: what a row is called: line, paragraph, row.
        numbers: of the rows where they are not 0, 1, …: blank lines count in a file.
        column: the option of the source.
        bare: whether a string or a list of ids may stand for a row.
        many: too many to be checked one by one before some are drawn; blank ones are passed over.
    """

    data: Sequence[Any]
    what: str
    subject: str
    unit: str = "row"
    numbers: list[int] | None = None
    column: str | None = None
    bare: bool = False
    many: bool = False

    def place(self, index: int) -> str:
        """What errors call the row with this index."""
        return f"{self.what}, {self.unit} {self.numbers[index] if self.numbers else index}"

    def row(self, index: int) -> Row | None:
        """The checked row; None where it is blank and may be.

        Raises:
            EPMQInputError: it is no row.
        """
        data, place = self.data[index], self.place(index)
        row = row_of(data, place, self.subject, column=self.column, bare=self.bare)
        if row is None and not self.many:
            raise bad_row(place, "the row is empty", self.subject, "Take it out.")
        return row


def open_items(source: RowSource, what: str, subject: str, folder: Path) -> Items:
    """What a source holds.

    Raises:
        EPMQInputError: it cannot be had, or is of another format.
    """
    if source.dataset is not None:
        data = _load_dataset(source, what, subject, folder)
        return Items(data, what, subject, column=source.column, many=True)
    if source.rows is not None:
        return _memory_items(source, what, subject)
    path = resolve_path(source.file, folder)
    _check_file(source, path, what, subject)
    if source.suffix in PARQUET:
        return Items(_parquet(source, path, what, subject), what, subject, column=source.column)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EPMQInputError(
            f"{what} is not readable as UTF-8 text: {reason}.",
            code="EPMQ-F32",
            subject=subject,
            remedy="Save it as UTF-8.",
        ) from error
    if source.suffix in JSON_LINES:
        return _json_items(source, text, what, subject)
    parts = _parts(text, source.unit)
    found = [(n, part.strip("\r\n")) for n, part in enumerate(parts, start=1) if part.strip()]
    data = [{"text": part} for _, part in found]
    return Items(data, what, subject, source.unit, [number for number, _ in found])


# ---- files -------------------------------------------------------------------------------------


def _check_file(source: RowSource, path: Path, what: str, subject: str) -> None:
    if not path.is_file():
        named = source.label if Path(source.file).is_absolute() else source.file
        hint = f" A dataset is `{{dataset: {named}, samples: 128}}`." if not path.suffix else ""
        raise EPMQInputError(
            f"{what}: there is no file `{named}`.",
            code="EPMQ-F22",
            subject=subject,
            remedy="A path in a recipe starts at the recipe's folder." + hint,
        )
    if source.suffix in _NOT_TEXT:
        raise EPMQInputError(
            f"{what} is neither text nor .jsonl nor .parquet.",
            code="EPMQ-F32",
            subject=subject,
            remedy=f"Read it with `{{dataset: {_NOT_TEXT[source.suffix]}, data_files: "
            f"{source.label}, samples: 128}}`.",
        )


def _parts(text: str, unit: str) -> Iterable[str]:
    if unit == "file":
        return [text]
    # str.splitlines would also cut at form feeds and other separators inside a line.
    return text.split("\n") if unit == "line" else re.split(r"\n\s*\n", text)


def _json_items(source: RowSource, text: str, what: str, subject: str) -> Items:
    data, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            cause = f"not JSON: {str(error).rstrip('.')}"
            raise bad_row(f"{what}, line {number}", cause, subject, "Correct the line.") from error
        lines.append(number)
    return Items(data, what, subject, "line", lines, source.column)


class _ParquetRows(Sequence):
    """The rows of an Arrow table as mappings, each made when it is asked for."""

    def __init__(self, table: Any):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]


def _parquet(source: RowSource, path: Path, what: str, subject: str) -> Sequence[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = {source.column, "attention_mask"} if source.column else {*KINDS, "attention_mask"}
        if isinstance(source, TaggedSource):
            wanted.add(source.expert_column)
        # Without any of them every name is needed, to say what there is instead.
        columns = [name for name in names if name in wanted]
        found = source.column in names or not source.column and set(columns) & set(KINDS)
        table = pyarrow.parquet.read_table(path, columns=columns if found else None)
    except (pyarrow.ArrowException, OSError) as error:
        raise EPMQInputError(
            f"{what} is not readable as a Parquet file: {_reason(error)}.",
            code="EPMQ-F32",
            subject=subject,
            remedy="Write it again.",
        ) from error
    return _ParquetRows(table)


# ---- datasets and memory -----------------------------------------------------------------------


def _load_dataset(source: RowSource, what: str, subject: str, folder: Path) -> Sequence[Any]:
    import datasets

    def local(spec: str) -> str:
        path = resolve_path(spec, folder)
        return str(path) if path.exists() else spec

    files = source.data_files
    if files is not None:
        files = [local(spec) for spec in ([files] if isinstance(files, str) else files)]
    try:
        return datasets.load_dataset(
            local(source.dataset),
            source.config,
            split=source.split or "train",
            revision=source.revision,
            data_files=files,
        )
    except Exception as error:
        # Unknown names, splits and revisions, gated sets, no network and broken files each come
        # as another library's exception; for the user all of them mean the same.
        raise EPMQInputError(
            f"{what}: the dataset could not be loaded: {_reason(error)}.",
            code="EPMQ-F22",
            subject=subject,
            remedy="Check `dataset`, `config`, `split` and `revision`, or give a `file`.",
        ) from error


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first.rstrip(".") or type(error).__name__


def _memory_items(source: RowSource, what: str, subject: str) -> Items:
    rows = source.rows
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise EPMQInputError(
            f"{what} should be a list of rows, got {type(rows).__name__}.",
            code="EPMQ-F32",
            subject=subject,
            remedy="Put the rows into a list.",
        )
    if _is_dataset(rows):
        return Items(rows, what, subject, column=source.column, many=True)
    if getattr(rows, "ndim", None) == 1 or isinstance(rows, (list, tuple)) and are_ids(rows):
        listed = shown([int(value) for value in list(rows)[:3]])
        raise EPMQInputError(
            f"{what} is one list of token ids, where a list of rows should be.",
            code="EPMQ-F32",
            subject=subject,
            remedy=f"Write `[{listed}]` for one row of these ids.",
        )
    return Items(list(rows), what, subject, column=source.column, bare=True)


def _is_dataset(rows: Any) -> bool:
    # A table on disk; whoever has one has imported the library.
    return type(rows).__name__ == "Dataset" and type(rows).__module__.startswith("datasets.")
