"""A recipe: everything about one quantization run, in one YAML file.

Reading and checking it needs neither torch nor GPTQModel, so that a mistake is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import EPMQInputError
from .options import (
    documented,
    from_mapping,
    is_count,
    option,
    parse_yaml,
    resolve_path,
    to_mapping,
)
from .rows import RowSource

if TYPE_CHECKING:
    from .config import EPMQConfig

RECIPE_VERSION = 1
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeStep:
    """How the merged model is made from the recipe's experts.

    Raises:
        EPMQInputError: an option of the wrong type; the method checks its own parameters.
    """

    method: str = option(doc="merge method; `epmq-gptq methods` lists them")
    base: str | None = option(None, doc="folder or hub id the experts were fine-tuned from")
    parameters: dict[str, Any] = option(factory=dict, doc="options of the method")
    keep: str | None = option(
        None, doc="folder that keeps the merged model; default: a temporary one beside --out"
    )

    def __post_init__(self) -> None:
        for name in ("method", "base", "keep"):
            value = getattr(self, name)
            if (name == "method" or value is not None) and not _is_word(value):
                raise EPMQInputError(f"`{name}` should be a non-empty string, got {value!r}.")
        if not isinstance(self.parameters, Mapping):
            raise EPMQInputError(
                f"`parameters` should be a mapping of options of `{self.method}`, got "
                f"{self.parameters!r}."
            )


@dataclass
class Recipe:
    """What ``epmq-gptq quantize`` runs.

    Paths stay as they are written; :meth:`place` and :meth:`source` resolve them against
    ``folder``, which is that of the recipe's file and no part of the recipe.

    Raises:
        EPMQInputError: naming the key, the rule, what was got and the remedy.
    """

    experts: dict[str, str] = option(
        doc="name -> folder or hub id `org/name@revision` of each model that was merged"
    )
    calibration: dict[str, list[RowSource]] = option(
        doc="expert -> file name, mapping of the options below, or a list of these"
    )
    merged: str | None = option(None, doc="folder or hub id of the merged model")
    merge: MergeStep | None = option(None, doc="instead of `merged`: merge the experts first")
    quantize: dict[str, Any] = option(
        factory=dict,
        doc="any option of EPMQConfig: bits, group_size, alpha, alpha_pattern, sym, desc_act, "
        "dynamic, lm_head, on_bad_module, ...",
    )
    seed: int = option(0, doc="of the drawing of calibration rows (default 0)")
    batch_size: int = option(1, doc="calibration rows per forward pass (default 1)")
    dtype: str | None = option(
        None,
        doc="of the computation: auto, float32, bfloat16, float16; default: float32 on a CPU, "
        "GPTQModel's choice on a GPU",
    )
    version: int = option(RECIPE_VERSION, doc="of the recipe's format (1)")
    folder: Path = field(default=Path(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise EPMQInputError(
                f"`version` should be {RECIPE_VERSION}, got {self.version!r}: this recipe was "
                "written for another version of epmq_gptq."
            )
        self._check_experts()
        self._check_merge()
        self._check_calibration()
        if not isinstance(self.quantize, Mapping):
            raise EPMQInputError(
                f"`quantize` should be a mapping of EPMQConfig's options, got {self.quantize!r}."
            )
        if "experts" in self.quantize:
            raise EPMQInputError("`quantize.experts`: the experts belong at the top of the recipe.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise EPMQInputError(f"`seed` should be an integer, got {self.seed!r}.")
        if not is_count(self.batch_size):
            raise EPMQInputError(
                f"`batch_size` should be a positive integer, got {self.batch_size!r}."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise EPMQInputError(
                f"`dtype` should be one of {', '.join(DTYPES)}, got {self.dtype!r}; leave it out "
                "for the default."
            )

    def _check_experts(self) -> None:
        if not isinstance(self.experts, Mapping) or not self.experts:
            raise EPMQInputError(
                "`experts` should map at least one name to a folder or hub id "
                f"(`experts: {{math: org/math-expert@revision}}`), got {self.experts!r}."
            )
        for name, spec in self.experts.items():
            if not _is_word(name) or not _is_word(spec):
                raise EPMQInputError(
                    f"`experts.{name}` should be a folder or a hub id under a name, got {spec!r}."
                )

    def _check_merge(self) -> None:
        if (self.merged is None) == (self.merge is None):
            raise EPMQInputError(
                "exactly one of `merged` (a model) and `merge` (how to make it) should be given, "
                "got " + ("neither." if self.merge is None else "both.")
            )
        if self.merged is not None and not _is_word(self.merged):
            raise EPMQInputError(f"`merged` should be a folder or a hub id, got {self.merged!r}.")
        if self.merge is not None and not isinstance(self.merge, MergeStep):
            self.merge = from_mapping(MergeStep, self.merge, "`merge`")

    def _check_calibration(self) -> None:
        if not isinstance(self.calibration, Mapping):
            raise EPMQInputError(
                "`calibration` should map every expert to its rows "
                f"(`calibration: {{math: math.jsonl}}`), got {self.calibration!r}."
            )
        missing = [name for name in self.experts if name not in self.calibration]
        unknown = [str(name) for name in self.calibration if name not in self.experts]
        if missing or unknown:
            raise EPMQInputError(
                "`calibration` and `experts` should have the same names"
                + (f"; without rows: {', '.join(missing)}" if missing else "")
                + (f"; not an expert: {', '.join(unknown)}" if unknown else "")
                + "."
            )
        self.calibration = {name: _sources(self.calibration[name], name) for name in self.experts}

    # ---- places --------------------------------------------------------------------------------

    def place(self, spec: str) -> Path:
        """The path that ``spec`` means in this recipe."""
        return resolve_path(spec, self.folder).absolute()

    def source(self, spec: str) -> str:
        """A model's folder as a path, or its hub id as it is."""
        path = self.place(spec)
        # `models/mth` beside a folder `models` is a typo in a path, not an id to ask the hub for.
        is_path = path.exists() or path.parent.is_dir() or spec.startswith((".", "~", "/"))
        return str(path) if is_path else spec

    def config(self) -> EPMQConfig:
        """The options of the quantization; importing them takes GPTQModel's seconds.

        Raises:
            EPMQInputError: an option of ``quantize`` or an expert's name is refused.
        """
        from . import EPMQConfig

        experts = {name: self.source(spec) for name, spec in self.experts.items()}
        try:
            return EPMQConfig.from_options({**self.quantize, "experts": experts})
        except EPMQInputError as error:
            raise EPMQInputError(f"`quantize`: {error}") from error

    # ---- plain data ----------------------------------------------------------------------------

    def to_options(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data, with the format's version."""
        options = {"version": self.version} | to_mapping(self)
        options["experts"] = dict(self.experts)
        options["calibration"] = {
            name: [to_mapping(source) for source in sources]
            for name, sources in self.calibration.items()
        }
        if self.merge is not None:
            options["merge"] = to_mapping(self.merge)
        return options

    @classmethod
    def from_options(cls, options: Any, folder: str | Path = "") -> Recipe:
        """The inverse of :meth:`to_options`; ``folder`` is what relative paths are relative to."""
        recipe = from_mapping(cls, options, "recipe")
        recipe.folder = Path(folder)
        return recipe

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """From a YAML file, or a JSON file named ``.json``."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix.lower() == ".json" else parse_yaml(text)
        except EPMQInputError as error:
            raise EPMQInputError(f"recipe `{path.name}`: {error}") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise EPMQInputError(f"recipe `{path}` is not readable: {reason}.") from error
        return cls.from_options(data, path.parent)

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return yaml.safe_dump(self.to_options(), sort_keys=False, allow_unicode=True)

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2, ensure_ascii=False)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _sources(value: Any, expert: str) -> list[RowSource]:
    what = f"`calibration.{expert}`"
    values = value if isinstance(value, list) else [value]
    if not values:
        raise EPMQInputError(f"{what} is empty; give rows of that expert's own task.")
    if len(values) == 1:
        places = [what]
    else:
        places = [f"`calibration.{expert}[{i}]`" for i in range(len(values))]
    return [
        item if isinstance(item, RowSource) else RowSource.from_option(item, place)
        for item, place in zip(values, places, strict=True)
    ]


def recipe_help() -> list[tuple[str, str]]:
    """(key, documentation) of everything a recipe may hold, nested keys with their path."""
    lines: list[tuple[str, str]] = []
    for key, doc in documented(Recipe).items():
        lines.append((key, doc))
        nested = {"merge": MergeStep, "calibration": RowSource}.get(key)
        if nested is not None:
            lines += [(f"  {name}", text) for name, text in documented(nested).items()]
    return lines
