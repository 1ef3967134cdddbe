"""What may be said about calibration rows: sources and their options. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.declared import bad_option, is_count, shown
from ..io.options import from_mapping, option

# In place of an expert's rows: it has none, and its Gram comes from its task vector.
DATA_FREE = "data_free"

UNITS = ("line", "paragraph", "file")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
# Read as text they would give rows of punctuation; `datasets` reads them under these names.
OTHER_FORMATS = {
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".gz": "json",
    ".zst": "json",
    ".xz": "json",
    ".bz2": "json",
    ".zip": "json",
}
OTHER_VALUES = ("refuse", "ignore")

# Rows of a file or a dataset may be whole books; those that a caller made are taken as they are.
SEQLEN = 2048
_ONLY_DATASET = ("config", "split", "revision", "data_files")
_PLACES = ("file", "dataset", "rows")


@dataclass(frozen=True)
class RowSource:
    """One source of an expert's calibration rows.

    Raises:
        EPMQInputError: an option is out of range or does not go with another.
    """

    file: str | None = option(
        None,
        doc="text file, or .jsonl or .parquet file with one `text`, `messages` or `input_ids` per "
        "row (pairs: also `target` or `labels`; images: `image`, a file beside it)",
    )
    dataset: str | None = option(None, doc="instead of `file`: a name of the `datasets` library")
    rows: Any = option(None, doc="instead of both: the rows themselves")
    samples: int | None = option(
        None,
        doc="how many rows (with `concat`: blocks), drawn with `seed`; default: all of them; a "
        "dataset needs it",
    )
    seqlen: int | None = option(
        None,
        doc="longer rows are cut to this many tokens (default 2048; of `rows`: what the model "
        "takes)",
    )
    concat: bool = option(
        False,
        doc="join the rows, the tokenizer's end of text between them, and cut them into blocks of "
        "exactly `seqlen` tokens",
    )
    unit: str = option("line", doc="a row of a text file: line (default), paragraph or file")
    column: str | None = option(
        None, doc="key or column with the rows; default: the one of text, messages, input_ids"
    )
    target_column: str | None = option(
        None, doc="of pairs: key or column with the answer; default: target, or labels"
    )
    config: str | None = option(None, doc="configuration of the dataset")
    split: str | None = option(None, doc="split of the dataset (default train)")
    revision: str | None = option(None, doc="revision of the dataset")
    data_files: str | list[str] | None = option(None, doc="files for a dataset such as `json`")
    seed: int | None = option(None, doc="of the draw; default: the recipe's, else 0")

    def __post_init__(self) -> None:
        given = [name for name in _PLACES if getattr(self, name) is not None]
        if len(given) != 1:
            raise EPMQInputError(
                "exactly one of `file`, `dataset` and `rows` should be given, got "
                f"{' and '.join(given) or 'none'}.",
                code="EPMQ-O03",
                subject="`file`, `dataset`, `rows`",
                remedy="Give the one that has the rows.",
            )
        for name in ("file", "dataset", "column", "target_column", "config", "split", "revision"):
            value = getattr(self, name)
            if value is not None and not is_word(value):
                raise bad_option(name, "a non-empty string", value)
        self._check_counts()
        files = self.data_files
        listed = [files] if isinstance(files, str) else files
        if files is not None and not (
            isinstance(listed, (list, tuple)) and listed and all(map(is_word, listed))
        ):
            raise bad_option("data_files", "a file name or a list of them", files)
        if self.unit not in UNITS:
            raise bad_option("unit", f"one of {', '.join(UNITS)}", self.unit)
        self._check_companions()

    def _check_counts(self) -> None:
        for name in ("samples", "seqlen"):
            value = getattr(self, name)
            if value is not None and not is_count(value):
                raise bad_option(
                    name, "a positive integer", value, f"Leave `{name}` out for the default."
                )
        if not isinstance(self.concat, bool):
            raise bad_option("concat", "true or false", self.concat)
        if self.concat and self.limit is None:
            raise EPMQInputError(
                "`concat` needs `seqlen`: how many tokens a block has.",
                code="EPMQ-O03",
                subject="`concat`",
                remedy="Give `seqlen`, for example 512.",
            )
        if self.seed is not None and not is_seed(self.seed):
            raise bad_option("seed", "an integer", self.seed)
        if self.dataset is not None and self.samples is None:
            raise EPMQInputError(
                f"`samples` is missing: dataset `{self.dataset}` may be of any size.",
                code="EPMQ-O03",
                subject="`samples`",
                remedy="Say how many rows, for example `samples: 128`.",
            )

    def _check_companions(self) -> None:
        if self.dataset is None:
            self._refuse(*_ONLY_DATASET, belongs_to="datasets")
        elif self.dataset.strip().lower() == "pandas":
            # Older versions of `datasets` unpickle its files, which runs what is in them.
            raise EPMQInputError(
                "`dataset: pandas` reads pickle files, which are never opened.",
                code="EPMQ-F14",
                subject="`dataset`",
                remedy="Write the rows as .jsonl or .parquet and give that `file`.",
            )
        if not self.is_text_file and self.unit != "line":
            self._refuse("unit", belongs_to="text files")
        if self.is_text_file:
            self._refuse("column", belongs_to=".jsonl and .parquet files and datasets")

    def _refuse(self, *names: str, belongs_to: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise EPMQInputError(
                    f"`{name}` is for {belongs_to}, got it with `{self.label}`.",
                    code="EPMQ-O03",
                    subject=f"`{name}`",
                    remedy="Leave it out.",
                )

    @classmethod
    def from_option(cls, value: Any, what: str) -> RowSource:
        """From a recipe: a file name, or a mapping of options."""
        return from_mapping(cls, {"file": value} if isinstance(value, str) else value, what)

    @property
    def suffix(self) -> str:
        """The file's extension in lower case; "" without a file."""
        return "" if self.file is None else Path(self.file).suffix.lower()

    @property
    def is_text_file(self) -> bool:
        """Whether its rows are lines, paragraphs or the whole of a text file."""
        tables = (*JSON_LINES, *PARQUET, *OTHER_FORMATS)
        return self.file is not None and self.suffix not in tables

    @property
    def limit(self) -> int | None:
        """The most tokens of a row, or those of a block; None: whatever the model takes."""
        return SEQLEN if self.seqlen is None and self.rows is None else self.seqlen

    @property
    def label(self) -> str:
        """What tables and errors call it; no path of this machine."""
        if self.file is not None:
            return Path(self.file).name[:80]
        return "rows" if self.dataset is None else public_path(self.dataset)[:80]


@dataclass(frozen=True)
class TaggedSource(RowSource):
    """One source for several experts: a column says whose each row is. ``samples`` is per expert.

    Raises:
        EPMQInputError: an option is out of range or does not go with another.
    """

    expert_column: str = option("", doc="column whose values are names of experts")
    experts_by_value: dict[Any, str] = option(
        factory=dict, doc="value of that column -> expert, where the values are no names"
    )
    other_values: str = option(
        "refuse", doc="what happens to rows of nobody: refuse (default) or ignore"
    )
    data_free: list[str] = option(factory=list, doc="experts that have no rows, see above")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_word(self.expert_column):
            raise bad_option("expert_column", "the name of a column", self.expert_column)
        if self.is_text_file:
            self._refuse("expert_column", belongs_to=".jsonl and .parquet files and datasets")
        if self.other_values not in OTHER_VALUES:
            raise bad_option("other_values", " or ".join(OTHER_VALUES), self.other_values)
        values = self.experts_by_value
        if not isinstance(values, Mapping) or not all(map(is_word, values.values())):
            raise bad_option("experts_by_value", "a mapping of values to experts", values)
        texts = list(map(str, values))
        twice = [text for text in texts if texts.count(text) > 1]
        if twice:
            # A number and its text are one value, see the reading of the column.
            raise bad_option("experts_by_value", "a mapping with every value once", twice)
        if not isinstance(self.data_free, (list, tuple)) or not all(map(is_word, self.data_free)):
            raise bad_option("data_free", "a list of experts", self.data_free)

    def check_experts(self, experts: Iterable[str]) -> None:
        """Refuse names that are none of ``experts``.

        Raises:
            EPMQInputError: naming the option and the name.
        """
        experts = list(experts)
        for name in ("experts_by_value", "data_free"):
            value = getattr(self, name)
            for expert in value.values() if isinstance(value, Mapping) else value:
                if expert not in experts:
                    raise EPMQInputError(
                        f"`calibration`: `{name}` names `{expert}`, which is not one of the "
                        f"experts {shown(experts)}.",
                        code="EPMQ-F21",
                        subject=f"`{name}`",
                        remedy="Use the names under `experts`.",
                    )


def is_data_free(value: Any) -> bool:
    """Whether this stands in place of an expert's rows."""
    return isinstance(value, str) and value == DATA_FREE


def public_path(spec: str) -> str:
    """A path as it was written; an absolute one without the folders of this machine."""
    return Path(spec).name if Path(spec).is_absolute() else spec


def is_word(value: Any) -> bool:
    """A string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_seed(value: Any) -> bool:
    """An int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)
