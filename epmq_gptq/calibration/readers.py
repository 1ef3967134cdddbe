"""Where calibration rows come from: text, JSON lines and Parquet files, ``datasets``, and memory.

Every source becomes :class:`Found`; what one of its rows says is checked by ``rows.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..io.declared import conflict, shown
from ..io.yaml_files import exists, resolve_path
from .rows import PAIRS, Keys, Row, RowForm, Where, are_ids
from .sources import JSON_LINES, OTHER_FORMATS, PARQUET, RowSource, TaggedSource, public_path


@dataclass(frozen=True)
class Found:
    """What a source holds, before anything is chosen.

    Attributes:
        data: the rows as they were found.
        source: where they come from.
        at: the source and the expert, for errors.
        form: what a row may be.
        unit: what a row is called: line, paragraph, row.
        numbers: of the rows where they are not 0, 1, …: blank lines count in a file.
        many: too many to be checked one by one before some are drawn; blank ones are passed over.
        folder: what the names of pictures are relative to.
    """

    data: Sequence[Any]
    source: RowSource
    at: Where
    form: RowForm
    unit: str = "row"
    numbers: list[int] | None = None
    many: bool = False
    folder: Path = Path()

    def where(self, index: int) -> Where:
        """What errors call the row with this index."""
        number = self.numbers[index] if self.numbers else index
        return self.at._replace(place=f"{self.at.place}, {self.unit} {number}")

    def row(self, index: int) -> Row | None:
        """The checked row; None where it is blank and may be.

        Raises:
            EPMQInputError: it is no row.
        """
        source, where = self.source, self.where(index)
        bare = source.rows is not None and not self.many
        row = self.form.check(
            self.data[index], Keys(source.column, source.target_column, bare), where
        )
        if row is None:
            if not self.many:
                raise where.bad("the row is empty", "Take it out.")
            return None
        if row.kind == "image" and isinstance(row.value, (str, Path)):
            return replace(row, value=resolve_path(str(row.value), self.folder))
        return row


def find_rows(source: RowSource, at: Where, folder: Path, form: RowForm) -> Found:
    """What a source holds, as rows of a form.

    Args:
        source: where the rows come from.
        at: how errors call it and the expert.
        folder: what relative paths are relative to.
        form: what a row may be.

    Raises:
        EPMQInputError: it cannot be had, or is of another format.
    """
    _check_form(source, form, at)
    beside = folder if source.file is None else resolve_path(source.file, folder).parent
    found = Found((), source, at, form, folder=beside)
    if source.dataset is not None:
        return _table(found, _load_dataset(source, at, folder))
    if source.rows is not None:
        return _given(found)
    path = resolve_path(source.file, folder)
    _check_file(source, path, at)
    if source.suffix in PARQUET:
        return replace(found, data=_parquet(found, path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        cause = f"it is not readable as UTF-8 text: {reason}"
        raise at.bad(cause, "Save it as UTF-8.") from error
    if source.suffix in JSON_LINES:
        return _json_lines(found, text)
    parts = [
        (number, part.strip("\r\n"))
        for number, part in enumerate(_parts(text, source.unit), start=1)
        if part.strip()
    ]
    data = [{"text": part} for _, part in parts]
    return replace(found, data=data, unit=source.unit, numbers=[number for number, _ in parts])


def _check_form(source: RowSource, form: RowForm, at: Where) -> None:
    """Refuse options that mean nothing for rows of this form."""
    if source.is_text_file and not form.from_text:
        raise at.bad(
            f"it is a text file, and this model reads {form.name}",
            "Give a .jsonl or .parquet file, a dataset, or the rows themselves.",
        )
    if source.concat and not form.from_text:
        cause = f"joins texts, and this model reads {form.name}"
        raise conflict("concat", cause, "Leave it out.").within(at.place)
    if source.target_column is not None and form is not PAIRS:
        cause = f"is for pairs of texts, and this model reads {form.name}"
        raise conflict("target_column", cause, "Leave it out.").within(at.place)


# ---- files -------------------------------------------------------------------------------------


def _check_file(source: RowSource, path: Path, at: Where) -> None:
    named = public_path(source.file)
    if not exists(path) or not path.is_file():
        remedy = "A path in a recipe starts at the recipe's folder."
        if " " in named:
            remedy += " Texts that are rows themselves are `{rows: [...]}`."
        elif exists(path):
            remedy = "It is a folder: list its files."
        elif not path.suffix:
            remedy += f" A dataset is `{{dataset: {named}, samples: 128}}`."
        raise at.bad(f"there is no file `{named[:80]}`", remedy, "EPMQ-F22")
    if source.suffix in OTHER_FORMATS:
        options = f"dataset: {OTHER_FORMATS[source.suffix]}, data_files: {named}, samples: 128"
        raise at.bad("it is neither text nor .jsonl nor .parquet", f"Read it with `{{{options}}}`.")


def _parts(text: str, unit: str) -> Iterable[str]:
    if unit == "file":
        return [text]
    # str.splitlines would also cut at form feeds and other separators inside a line.
    return text.split("\n") if unit == "line" else re.split(r"\n\s*\n", text)


def _json_lines(found: Found, text: str) -> Found:
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    found = replace(found, unit="line", numbers=[number for number, _ in lines])
    data = []
    for index, (_, line) in enumerate(lines):
        try:
            data.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            cause = f"not JSON: {str(error).rstrip('.')}"
            raise found.where(index).bad(cause, "Correct the line.") from error
    return replace(found, data=data)


class _ParquetRows(Sequence):
    """The rows of an Arrow table as mappings, each made when it is asked for."""

    def __init__(self, table: Any):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]


def _needed(found: Found, names: Sequence[str]) -> list[str] | None:
    """The columns to read of these; None for all, where one is missing.

    Then the names are needed to say what there is instead. Others may hold images or anything.
    """
    source, form = found.source, found.form
    kinds = [source.column] if source.column else form.kinds
    tag = [source.expert_column] if isinstance(source, TaggedSource) else []
    if not set(kinds) & set(names) or not set(tag) <= set(names):
        return None
    wanted = {*kinds, *tag, *form.others, source.target_column, "attention_mask"}
    return [name for name in names if name in wanted]


def _parquet(found: Found, path: Path) -> Sequence[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        table = pyarrow.parquet.read_table(path, columns=_needed(found, names))
    except (pyarrow.ArrowException, OSError) as error:
        cause = f"it is not readable as a Parquet file: {_reason(error)}"
        raise found.at.bad(cause, "Write it again.") from error
    # To find a row takes time with the number of chunks, one for every group of rows of the file.
    return _ParquetRows(table.combine_chunks())


# ---- datasets and memory -----------------------------------------------------------------------


def _load_dataset(source: RowSource, at: Where, folder: Path) -> Sequence[Any]:
    import datasets

    paths: dict[str, str] = {}

    def local(spec: str) -> str:
        path = resolve_path(spec, folder)
        found = str(path) if exists(path) else spec
        paths[str(Path(found).absolute())] = public_path(spec)  # for what `datasets` says of it
        return found

    files = source.data_files
    # With files it may be a format, also beside a folder of that name.
    is_format = files is not None and "/" not in source.dataset
    if files is not None:
        files = [local(spec) for spec in ([files] if isinstance(files, str) else files)]
    try:
        return datasets.load_dataset(
            source.dataset if is_format else local(source.dataset),
            source.config,
            split=source.split or "train",
            revision=source.revision,
            data_files=files,
        )
    except Exception as error:
        # Unknown names, splits and revisions, gated sets, no network and broken files each come
        # as another library's exception; for the user all of them mean the same.
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # it says nothing itself
        reason = _reason(error)
        for path, public in paths.items():
            reason = reason.replace(path, public)
        remedy = "Check `dataset`, `config`, `split` and `revision`, or give a `file`."
        raise at.bad(f"the dataset could not be loaded: {reason}", remedy, "EPMQ-F22") from error


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first.rstrip(".") or type(error).__name__


def _table(found: Found, table: Any) -> Found:
    columns = _needed(found, table.column_names)
    table = table if columns is None else table.select_columns(columns)
    return replace(found, data=table, many=True)


def _given(found: Found) -> Found:
    rows = found.source.rows
    # A table on disk; whoever has one has imported the library.
    if type(rows).__name__ == "Dataset" and type(rows).__module__.startswith("datasets."):
        return _table(found, rows)
    remedy = _in_a_list(rows)
    if remedy is not None:
        raise found.at.bad(f"should be a list of rows, got {type(rows).__name__}", remedy)
    listed = rows.tolist() if getattr(rows, "ndim", None) == 1 else list(rows)
    if are_ids(listed):
        row = shown([int(value) for value in listed[:3]])
        cause = "it is one list of token ids, where a list of rows should be"
        raise found.at.bad(cause, f"Write `[{row}]` for one row of these ids.")
    return replace(found, data=listed)


def _in_a_list(rows: Any) -> str | None:
    """What to do about something that is no series of rows; None where it is one."""
    if hasattr(rows, "columns") or hasattr(rows, "column_names"):
        # Iterating over a data frame gives the names of its columns, over a stream all of the web.
        if hasattr(rows, "take") and not hasattr(rows, "columns"):
            return "Take as many rows as needed into a list: `list(rows.take(128))`."
        return "Give a list of its rows, or make a `datasets.Dataset` of it."
    if isinstance(rows, Set):
        return "Put the rows into a list: a set has another order in every run."
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        return "Put the rows into a list."
    return None
