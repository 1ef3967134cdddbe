"""Where calibration rows come from: text files, JSON lines, and the ``datasets`` library."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EPMQInputError
from .options import resolve_path

if TYPE_CHECKING:
    from .rows import RowSource

Row = dict[str, Any]

KINDS = ("text", "messages", "input_ids")
JSON_LINES = (".jsonl", ".ndjson")
# Read as text they would give rows of punctuation.
_NOT_TEXT = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def check_enough(what: str, wanted: int, found: int, note: str = "") -> None:
    """Raise EPMQInputError, with both numbers, if a source has fewer rows than were asked for."""
    if found < wanted:
        raise EPMQInputError(
            f"{what}: `samples` asks for {wanted} rows, there are {found}{note}; add rows or lower "
            "`samples`."
        )


# ---- files -------------------------------------------------------------------------------------


def read_file(source: RowSource, what: str, folder: Path) -> list[Row]:
    """All rows of a text or JSON lines file; blank lines are none.

    Raises:
        EPMQInputError: no such file, another format, or a line that is no row.
    """
    path = resolve_path(source.file, folder)
    if not path.is_file():
        dataset = f"; for a dataset write `{{dataset: {source.file}, samples: 128}}`"
        raise EPMQInputError(
            f"{what}: there is no file `{source.file}` (paths are relative to the recipe)"
            f"{'' if path.suffix else dataset}."
        )
    suffix = path.suffix.lower()
    if suffix in _NOT_TEXT:
        raise EPMQInputError(
            f"{what} is neither text nor .jsonl; read it with `{{dataset: {_NOT_TEXT[suffix]}, "
            f"data_files: {source.label}, samples: 128}}`."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise EPMQInputError(f"{what} is not readable as UTF-8 text: {error}.") from error
    if suffix in JSON_LINES:
        return _json_rows(source, what, text)
    if source.unit == "file":
        parts: Iterable[str] = [text]
    else:
        # str.splitlines would also cut at form feeds and other separators inside a line.
        parts = text.split("\n") if source.unit == "line" else re.split(r"\n\s*\n", text)
    return [{"text": part.strip("\r\n")} for part in parts if part.strip()]


def _json_rows(source: RowSource, what: str, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise EPMQInputError(f"{what}, line {number}: not JSON: {error}.") from error
        row = _row(data, source.column, f"{what}, line {number}")
        if row is None:
            raise EPMQInputError(f"{what}, line {number}: the row is empty; take the line out.")
        rows.append(row)
    return rows


# ---- datasets ----------------------------------------------------------------------------------


def read_dataset(
    source: RowSource, what: str, draw: random.Random, folder: Path
) -> tuple[list[Row], int]:
    """``source.samples`` rows of a dataset in its own order, and how many rows it has.

    Blank rows are passed over, never returned and never counted as samples.

    Raises:
        EPMQInputError: it cannot be loaded, has too few rows, or its column holds no rows.
    """
    data = _load_dataset(source, what, folder)
    order = list(range(len(data)))
    draw.shuffle(order)
    chosen: dict[int, Row] = {}
    blank = 0
    for index in order:
        row = _row(data[index], source.column, f"{what}, row {index}")
        if row is None:  # public text sets are full of empty lines
            blank += 1
            continue
        chosen[index] = row
        if len(chosen) == source.samples:
            break
    note = f" in split `{source.split or 'train'}`" + (f" besides {blank} blank" if blank else "")
    check_enough(what, source.samples, len(chosen), note)
    return [chosen[index] for index in sorted(chosen)], len(data)


def _load_dataset(source: RowSource, what: str, folder: Path):
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
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise EPMQInputError(
            f"{what}: the dataset could not be loaded: {reason} Check `dataset`, `config` and "
            "`split`, or give a `file`."
        ) from error


# ---- one row -----------------------------------------------------------------------------------


def _row(data: Any, column: str | None, where: str) -> Row | None:
    """The row that ``data`` holds, or None where it is blank."""
    if not isinstance(data, Mapping):
        raise EPMQInputError(f"{where}: a row should be a mapping, got {type(data).__name__}.")
    keys = [column] if column is not None else [kind for kind in KINDS if kind in data]
    if len(keys) != 1 or keys[0] not in data:
        wanted = f"`{column}`" if column is not None else "exactly one of " + ", ".join(KINDS)
        raise EPMQInputError(
            f"{where}: should have {wanted}, it has {', '.join(map(str, data)) or 'nothing'}; name "
            "the right one with `column`."
        )
    value = data[keys[0]]
    kind = _kind(value)
    if value is None or (kind is None and value == []) or (kind == "text" and not value.strip()):
        return None
    if kind is None or (keys[0] in KINDS and kind != keys[0]):
        raise EPMQInputError(
            f"{where}: `{keys[0]}` should be a string (text), a list of token ids (input_ids) or "
            f"of chat messages with `role` and `content` (messages), got {str(value)[:80]!r}."
        )
    row = {kind: value}
    if kind == "input_ids" and data.get("attention_mask") is not None:
        row["attention_mask"] = list(data["attention_mask"])
        if len(row["attention_mask"]) != len(value):
            raise EPMQInputError(
                f"{where}: `attention_mask` has {len(row['attention_mask'])} entries, `input_ids` "
                f"has {len(value)}; they should be as long."
            )
    return row


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return "input_ids"
    if all(isinstance(item, Mapping) and {"role", "content"} <= set(item) for item in value):
        return "messages"
    return None
