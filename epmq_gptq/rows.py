"""Calibration sources → rows: text, JSON lines or a dataset; counted, sampled and cut as asked.

A row is ``{"text": …}``, ``{"messages": […]}`` or ``{"input_ids": […]}``: what GPTQModel takes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EPMQInputError
from .options import from_mapping, is_count, option
from .row_readers import JSON_LINES, Row, check_enough, read_dataset, read_file

UNITS = ("line", "paragraph", "file")
_ONLY_DATASET = ("config", "split", "revision", "data_files")


@dataclass(frozen=True)
class RowSource:
    """One source of an expert's calibration rows.

    Raises:
        EPMQInputError: an option is out of range or does not go with another.
    """

    file: str | None = option(
        None, doc="text file, or .jsonl file with one `text`, `messages` or `input_ids` per line"
    )
    dataset: str | None = option(None, doc="instead of `file`: a name of the `datasets` library")
    samples: int | None = option(
        None, doc="how many rows, drawn with `seed`; default: all of a file; a dataset needs it"
    )
    max_tokens: int = option(2048, doc="longer rows are cut to this many tokens (default 2048)")
    unit: str = option("line", doc="a row of a text file: line (default), paragraph or file")
    column: str | None = option(
        None, doc="key or column with the rows; default: the one of text, messages, input_ids"
    )
    config: str | None = option(None, doc="configuration of the dataset")
    split: str | None = option(None, doc="split of the dataset (default train)")
    revision: str | None = option(None, doc="revision of the dataset")
    data_files: str | list[str] | None = option(None, doc="files for a dataset such as `json`")

    def __post_init__(self) -> None:
        if (self.file is None) == (self.dataset is None):
            raise EPMQInputError(
                "exactly one of `file` and `dataset` should be given, got "
                + ("neither." if self.file is None else "both.")
            )
        for name in ("file", "dataset", "column", "config", "split", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise EPMQInputError(f"`{name}` should be a non-empty string, got {value!r}.")
        if not is_count(self.max_tokens):
            raise EPMQInputError(
                f"`max_tokens` should be a positive integer, got {self.max_tokens!r}."
            )
        if self.samples is not None and not is_count(self.samples):
            raise EPMQInputError(
                f"`samples` should be a positive integer, got {self.samples!r}; leave it out to "
                "take every row of a file."
            )
        if self.unit not in UNITS:
            raise EPMQInputError(f"`unit` should be one of {', '.join(UNITS)}, got {self.unit!r}.")
        if self.dataset is not None:
            if self.samples is None:
                raise EPMQInputError(
                    f"`samples` is missing: dataset `{self.dataset}` may be of any size; say how "
                    "many rows, for example `samples: 128`."
                )
            self._refuse(["unit"] if self.unit != "line" else [], "text files")
            return
        self._refuse(
            [name for name in _ONLY_DATASET if getattr(self, name) is not None], "datasets"
        )
        json_lines = Path(self.file).suffix.lower() in JSON_LINES
        if json_lines:
            self._refuse(["unit"] if self.unit != "line" else [], "text files")
        else:
            self._refuse(["column"] if self.column is not None else [], ".jsonl files and datasets")

    def _refuse(self, names: Sequence[str], belongs_to: str) -> None:
        if names:
            raise EPMQInputError(
                f"`{names[0]}` is for {belongs_to}, got it with `{self.file or self.dataset}`; "
                "leave it out."
            )

    @classmethod
    def from_option(cls, value: Any, what: str) -> RowSource:
        """From a recipe: a file name, or a mapping of options."""
        return from_mapping(cls, {"file": value} if isinstance(value, str) else value, what)

    @property
    def label(self) -> str:
        """What tables and errors call it; no path of this machine."""
        return Path(self.file).name if self.file is not None else str(self.dataset)


@dataclass(frozen=True)
class RowSet:
    """The rows that were taken from one source.

    Attributes:
        source: where they came from.
        rows: the rows, in the order of the source.
        available: how many the source has; of a dataset, counted with its blank rows.
    """

    source: RowSource
    rows: list[Row]
    available: int


@dataclass(frozen=True)
class FittedRows:
    """One expert's rows, none longer than allowed.

    Attributes:
        rows: the rows of all sources.
        cut: how many of them were longer and lost their end.
        tokens: left in all of them.
    """

    rows: list[Row]
    cut: int
    tokens: int


def read_rows(
    sources: Sequence[RowSource], *, expert: str, seed: int, folder: Path
) -> list[RowSet]:
    """Read one expert's sources; the counts asked for are the counts returned.

    Args:
        sources: of this expert.
        expert: its name, for the errors and, with ``seed``, for the draw.
        seed: of the recipe: the same seed draws the same rows, on any machine.
        folder: what relative paths are relative to.

    Raises:
        EPMQInputError: a source cannot be read, holds something else than rows, or has too few.
    """
    sets = []
    for index, source in enumerate(sources):
        what = f"`calibration.{expert}`: `{source.label}`"
        draw = random.Random(f"{seed}:{expert}:{index}")
        if source.dataset is not None:
            taken, available = read_dataset(source, what, draw, folder)
            sets.append(RowSet(source, taken, available))
            continue
        rows = read_file(source, what, folder)
        if not rows:
            raise EPMQInputError(f"{what} holds no rows; give rows of that expert's own task.")
        wanted = len(rows) if source.samples is None else source.samples
        check_enough(what, wanted, len(rows))
        chosen = sorted(draw.sample(range(len(rows)), wanted))
        sets.append(RowSet(source, [rows[i] for i in chosen], len(rows)))
    return sets


def fit_rows(
    sets: Sequence[RowSet], tokenizer: Any, *, expert: str, limit: int | None = None
) -> FittedRows:
    """Cut the rows that are longer than their ``max_tokens`` or than the model's context.

    A row that fits stays as it is; one that is cut becomes the first token ids of what GPTQModel
    would have made of it (its special tokens and chat template included).

    Args:
        sets: what :func:`read_rows` returned.
        tokenizer: of the merged model.
        expert: whose rows, for the errors.
        limit: the model's context in tokens.

    Raises:
        EPMQInputError: chat rows, and a tokenizer without a chat template.
    """
    rows: list[Row] = []
    cut = tokens = 0
    for each in sets:
        allowed = min(each.source.max_tokens, limit or each.source.max_tokens)
        for row in each.rows:
            ids = _token_ids(row, tokenizer, f"`calibration.{expert}`: `{each.source.label}`")
            tokens += min(len(ids), allowed)
            if len(ids) <= allowed:
                rows.append(row)
                continue
            cut += 1
            shorter = {"input_ids": list(ids[:allowed])}
            if "attention_mask" in row:
                shorter["attention_mask"] = row["attention_mask"][:allowed]
            rows.append(shorter)
    return FittedRows(rows, cut, tokens)


def _token_ids(row: Row, tokenizer: Any, what: str) -> list[int]:
    if "input_ids" in row:
        return row["input_ids"]
    text = row.get("text")
    if text is None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise EPMQInputError(
                f"{what} holds `messages`, and the merged model's tokenizer has no chat template; "
                "give `text` rows, or add the template to the merged model."
            )
        text = tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=False
        )
    return tokenizer(text, add_special_tokens=True)["input_ids"]
