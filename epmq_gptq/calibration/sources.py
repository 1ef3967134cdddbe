"""Where calibration rows come from, and whose they are: what may be said, checked before any read.

A recipe's ``calibration`` and the argument of ``model.quantize`` become the same thing here: a
:class:`RowSource` list per expert, or one :class:`TaggedSource` for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import EPMQInputError
from ..io.declared import Count, Declared, Whole, Word, bad_option, conflict, shown, validated
from .rows import Where

# In place of an expert's rows: it has none, and its Gram comes from its task vector.
DATA_FREE = "data_free"

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
# Read as text they would give rows of punctuation; `datasets` reads them under these names.
OTHER_FORMATS = {".json": "json", ".csv": "csv", ".arrow": "arrow"} | dict.fromkeys(
    (".gz", ".zst", ".xz", ".bz2", ".zip"), "json"
)
# What a mapping has that is a row and no set of options.
ROW_KEYS = ("text", "messages", "input_ids", "image", "pixel_values")

# Rows of a file or a dataset may be whole books; those that a caller made are taken as they are.
SEQLEN = 2048
_TABLES = ".jsonl and .parquet files and datasets"


class RowSource(Declared):
    """One source of an expert's calibration rows.

    Raises:
        EPMQInputError: an option is out of range or does not go with another.
    """

    file: Word | None = Field(
        None,
        description="text file, or .jsonl or .parquet file with one `text`, `messages` or "
        "`input_ids` per row (pairs: also `target` or `labels`; images: `image`, a file beside it)",
    )
    dataset: Word | None = Field(
        None, description="instead of `file`: a name of the `datasets` library"
    )
    rows: Any = Field(None, description="instead of both: the rows themselves")
    samples: Count | None = Field(
        None,
        description="how many rows (with `concat`: blocks), drawn with `seed`; default: all of "
        "them; a dataset needs it",
    )
    seqlen: Count | None = Field(
        None,
        description="longer rows are cut to this many tokens (default 2048; of `rows`: what the "
        "model takes)",
    )
    concat: bool = Field(
        False,
        description="join the rows, the tokenizer's end of text between them, and cut them into "
        "blocks of exactly `seqlen` tokens",
    )
    unit: Literal["line", "paragraph", "file"] = Field(
        "line", description="a row of a text file: line (default), paragraph or file"
    )
    column: Word | None = Field(
        None,
        description="key or column with the rows; default: the one of text, messages, input_ids",
    )
    target_column: Word | None = Field(
        None, description="of pairs: key or column with the answer; default: target, or labels"
    )
    config: Word | None = Field(None, description="configuration of the dataset")
    split: Word | None = Field(None, description="split of the dataset (default train)")
    revision: Word | None = Field(None, description="revision of the dataset")
    data_files: Word | Annotated[list[Word], Field(min_length=1)] | None = Field(
        None, description="files for a dataset such as `json`"
    )
    seed: Whole | None = Field(None, description="of the draw; default: the recipe's, else 0")

    @model_validator(mode="after")
    def _check(self) -> RowSource:
        given = [name for name in ("file", "dataset", "rows") if getattr(self, name) is not None]
        if len(given) != 1:
            raise EPMQInputError(
                "exactly one of `file`, `dataset` and `rows` should be given, got "
                f"{' and '.join(given) or 'none'}.",
                code="EPMQ-O03",
                subject="`file`, `dataset`, `rows`",
                remedy="Give the one that has the rows.",
            )
        if self.concat and self.limit is None:
            cause = "needs `seqlen`: how many tokens a block has"
            raise conflict("concat", cause, "Give `seqlen`, for example 512.")
        if self.dataset is None:
            self._refuse("config", "split", "revision", "data_files", belongs_to="datasets")
        elif self.samples is None:
            cause = f"is missing: dataset `{self.dataset}` may be of any size"
            remedy = "Say how many rows, for example `samples: 128`."
            raise conflict("samples", cause, remedy)
        elif self.dataset.strip().lower() == "pandas":
            # Older versions of `datasets` unpickle its files, which runs what is in them.
            raise EPMQInputError(
                "`dataset: pandas` reads pickle files, which are never opened.",
                code="EPMQ-F14",
                subject="`dataset`",
                remedy="Write the rows as .jsonl or .parquet and give that `file`.",
            )
        if self.is_text_file:
            self._refuse("column", belongs_to=_TABLES)
        elif self.unit != "line":
            self._refuse("unit", belongs_to="text files")
        return self

    def _refuse(self, *names: str, belongs_to: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise conflict(
                    name, f"is for {belongs_to}, got it with `{self.label}`", "Leave it out."
                )

    @classmethod
    def from_option(cls, value: Any, what: str) -> RowSource:
        """From a recipe: a file name, or a mapping of options."""
        if isinstance(value, TaggedSource):  # one expert's rows have no column with experts
            value = value.given()
        return validated(cls, {"file": value} if isinstance(value, str) else value, what)

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


class TaggedSource(RowSource):
    """One source for several experts: a column says whose each row is. ``samples`` is per expert.

    Raises:
        EPMQInputError: an option is out of range or does not go with another.
    """

    expert_column: Word = Field(description="column whose values are names of experts")
    experts_by_value: dict[Any, Word] = Field(
        {}, description="value of that column -> expert, where the values are no names"
    )
    other_values: Literal["refuse", "ignore"] = Field(
        "refuse", description="what happens to rows of nobody: refuse (default) or ignore"
    )
    data_free: list[Word] = Field([], description="experts that have no rows, see above")

    @model_validator(mode="after")
    def _check_tags(self) -> TaggedSource:
        if self.is_text_file:
            self._refuse("expert_column", belongs_to=_TABLES)
        texts = list(map(str, self.experts_by_value))
        twice = [text for text in texts if texts.count(text) > 1]
        if twice:
            # A number and its text are one value, see the reading of the column.
            raise bad_option("experts_by_value", "a mapping with every value once", twice)
        return self

    def check_experts(self, experts: Sequence[str]) -> None:
        """Refuse names that are none of ``experts``.

        Raises:
            EPMQInputError: naming the option and the name.
        """
        named = {"experts_by_value": self.experts_by_value.values(), "data_free": self.data_free}
        for option, names in named.items():
            for name in names:
                if name not in experts:
                    raise EPMQInputError(
                        f"`calibration`: `{option}` names `{name}`, which is not one of the "
                        f"experts {shown(list(experts))}.",
                        code="EPMQ-F21",
                        subject=f"`{option}`",
                        remedy="Use the names under `experts`.",
                    )


# What a calibration is once it was checked.
CalibrationBlock = TaggedSource | dict[str, list[RowSource] | str]


def is_data_free(value: Any) -> bool:
    """Whether this stands in place of an expert's rows."""
    return isinstance(value, str) and value == DATA_FREE


def public_path(spec: str) -> str:
    """A path as it was written; an absolute one without the folders of this machine."""
    return Path(spec).name if Path(spec).is_absolute() else spec


# ---- a recipe ----------------------------------------------------------------------------------


def recipe_calibration(value: Any, experts: Sequence[str]) -> CalibrationBlock:
    """Check the ``calibration`` of a recipe: expert → sources or ``data_free``, or a tagged source.

    Raises:
        EPMQInputError: the experts' names are others, or an option of a source is refused.
    """
    value = _tagged(value, experts)
    if isinstance(value, TaggedSource):
        check_some_rows([name for name in experts if name not in value.data_free])
        return value
    check_names(value, experts)
    block = {
        name: DATA_FREE if is_data_free(value[name]) else _sources(value[name], name)
        for name in experts
    }
    check_some_rows([name for name, sources in block.items() if sources != DATA_FREE])
    return block


def _tagged(value: Any, experts: Sequence[str]) -> Any:
    """A tagged source where the value is one, else the value."""
    if isinstance(value, Mapping) and "expert_column" in value:
        value = validated(TaggedSource, value, "`calibration`")
    if isinstance(value, TaggedSource):
        value.check_experts(experts)
    return value


def _sources(value: Any, expert: str) -> list[RowSource]:
    what = f"`calibration.{expert}`"
    values = value if isinstance(value, list) else [value]
    if not values or any(map(is_data_free, values)):
        cause = "it has `data_free` in a list" if values else "it is empty"
        remedy = "Give rows of that expert's own task, or `data_free` in their place."
        raise Where(what, f"expert `{expert}`").bad(cause, remedy, "EPMQ-F22")
    if len(values) == 1:
        return [RowSource.from_option(values[0], what)]
    return [
        RowSource.from_option(item, f"`calibration.{expert}[{index}]`")
        for index, item in enumerate(values)
    ]


# ---- a call from Python ------------------------------------------------------------------------


def python_calibration(
    value: Any, experts: Sequence[str], data_free: Sequence[str]
) -> CalibrationBlock:
    """Check a calibration that Python gave, which may hold the rows themselves.

    Args:
        value: see :func:`~epmq_gptq.calibration.draws.read_calibration`; also a recipe's.
        experts: the experts of the run.
        data_free: those of them that have no rows.

    Returns:
        As of :func:`recipe_calibration`, for the experts that have rows.

    Raises:
        EPMQInputError: the names differ, or a source is refused.
    """
    named = [name for name in experts if name not in data_free]
    value = _tagged(value, experts)
    if isinstance(value, TaggedSource):
        for name in value.data_free:
            _check_data_free(name, True, name in data_free)
        check_some_rows(named)
        return value
    if isinstance(value, Mapping):
        for name in [name for name in value if name in experts]:
            _check_data_free(name, is_data_free(value[name]), name in data_free)
        value = {name: each for name, each in value.items() if not is_data_free(each)}
    check_names(value, named)
    check_some_rows(named)
    return {name: given_sources(value[name], name) for name in named}


def _check_data_free(expert: str, given: bool, option: bool) -> None:
    if given != option:
        has = "is `data_free`" if given else "has rows"
        other = "does not name it" if given else "names it as well"
        raise Where("`calibration`", f"expert `{expert}`").bad(
            f"expert `{expert}` {has}, and the option `data_free` {other}",
            "Say the same in both.",
            "EPMQ-O03",
        )


def given_sources(value: Any, expert: str) -> list[RowSource]:
    """The sources that a Python caller may mean for one expert.

    Raises:
        EPMQInputError: it is nothing of the kind.
    """
    at = Where(f"calibration of expert `{expert}`", f"expert `{expert}`")
    if isinstance(value, Mapping):
        _check_options(value, at)
    if isinstance(value, (str, Path, Mapping, RowSource)):
        return [_source(value, at.place)]
    if isinstance(value, (list, tuple)) and value:
        if all(map(_is_source, value)):
            return [_source(each, at.place) for each in value]
        _check_no_names(value, at)
    if value is None:
        remedy = "Give rows of that expert's own task."
        raise at.bad("should be rows, got None", remedy, "EPMQ-F22")
    return [RowSource(rows=value)]


def _source(value: Any, what: str) -> RowSource:
    return RowSource.from_option(str(value) if isinstance(value, Path) else value, what)


def _is_source(value: Any) -> bool:
    """Whether what is in a list says where rows are and is no row."""
    if isinstance(value, Mapping):
        return not set(ROW_KEYS) & set(value) and bool(set(RowSource.model_fields) & set(value))
    return isinstance(value, (RowSource, Path))


def _check_options(value: Mapping, at: Where) -> None:
    """A row, a tokenizer's batch and a dataset's splits are mappings too."""
    splits = any(hasattr(each, "column_names") for each in value.values())
    if "rows" not in value and (splits or set(ROW_KEYS) & set(value)):
        remedy = "Give one of its splits." if splits else "Put the rows, a mapping each, in a list."
        raise at.bad(f"it is a mapping of {listed(map(str, value))}, where rows should be", remedy)


def _check_no_names(rows: Sequence[Any], at: Where) -> None:
    """Names of files in a list would be read as texts, in a recipe they are files."""
    names = [row for row in rows if isinstance(row, str) and len(row.split()) == 1]
    files = [name for name in names if Path(name).suffix.lower() in (*JSON_LINES, *PARQUET, ".txt")]
    if len(files) == len(rows) or is_data_free(rows[0]):
        raise at.bad(
            f"the rows should be texts, got `{Path(rows[0]).name[:80]}`",
            "In a list a file is a `Path`; `data_free` stands in place of the list.",
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
