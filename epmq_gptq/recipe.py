"""A recipe: everything about one quantization run, in one YAML file.

Reading and checking it needs neither torch nor GPTQModel, so that a mistake is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration.names import CalibrationBlock, recipe_calibration
from .calibration.rows import DATA_FREE, RowSource, TaggedSource, is_seed, is_word
from .errors import EPMQInputError
from .io.declared import bad_option, is_count, shown
from .io.hub import parse_hub_id
from .io.options import documented, from_mapping, option, to_mapping
from .io.yaml_files import exists, parse_json, parse_yaml, resolve_path, write_yaml

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
            if (name == "method" or value is not None) and not is_word(value):
                raise bad_option(name, "a non-empty string", value)
        if not isinstance(self.parameters, Mapping):
            raise bad_option(
                "parameters", f"a mapping of options of `{self.method}`", self.parameters
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
    calibration: CalibrationBlock = option(
        doc="expert -> file name, mapping of the options below, a list of these, or `data_free` "
        "for an expert without rows; or one mapping with `expert_column` for all experts"
    )
    merged: str | None = option(None, doc="folder or hub id of the merged model")
    merge: MergeStep | None = option(None, doc="instead of `merged`: merge the experts first")
    quantize: dict[str, Any] = option(
        factory=dict,
        doc="any option of EPMQConfig: bits, group_size, profile, alpha, eta, rho, sym, desc_act, "
        "dynamic, lm_head, on_bad_module, ...",
    )
    seed: int = option(0, doc="of the drawing of calibration rows (default 0)")
    batch_size: int = option(1, doc="calibration rows per forward pass (default 1)")
    dtype: str | None = option(
        None,
        doc="of the computation: auto, float32, bfloat16, float16; default: float32 on a CPU, "
        "GPTQModel's choice on a GPU",
    )
    lineage: dict[str, Any] = option(
        factory=dict,
        doc="what is known of how `merged` was made; goes into the checkpoint's record "
        "(`--write-recipe` writes it)",
    )
    version: int = option(RECIPE_VERSION, doc="of the recipe's format (1)")
    folder: Path = field(default=Path(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.version) or self.version != RECIPE_VERSION:
            raise bad_option(
                "version",
                f"{RECIPE_VERSION}",
                self.version,
                "This recipe was written for another version of epmq_gptq: use that one.",
                "EPMQ-O04",
            )
        self._check_experts()
        self._check_merge()
        self.calibration = recipe_calibration(self.calibration, list(self.experts))
        self._check_quantize()
        if not is_seed(self.seed):
            raise bad_option("seed", "an integer", self.seed)
        if not is_count(self.batch_size):
            raise bad_option("batch_size", "a positive integer", self.batch_size)
        self._check_lineage()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise bad_option(
                "dtype", f"one of {', '.join(DTYPES)}", self.dtype, "Leave it out for the default."
            )

    def _check_experts(self) -> None:
        if not isinstance(self.experts, Mapping) or not self.experts:
            raise EPMQInputError(
                "`experts` should map at least one name to a folder or hub id, got "
                f"{shown(self.experts)}.",
                code="EPMQ-F20",
                subject="`experts`",
                remedy="For example `experts: {math: org/math-expert@revision}`.",
            )
        for name, spec in self.experts.items():
            if not is_word(name) or not is_word(spec):
                raise bad_option(
                    f"experts.{shown(name) if not is_word(name) else name[:80]}",
                    "a folder or a hub id under a name",
                    spec,
                )

    def _check_merge(self) -> None:
        if (self.merged is None) == (self.merge is None):
            raise EPMQInputError(
                "exactly one of `merged` (a model) and `merge` (how to make it) should be given, "
                f"got {'neither' if self.merge is None else 'both'}.",
                code="EPMQ-O03",
                subject="`merged`, `merge`",
                remedy="Give the one that you have.",
            )
        if self.merged is not None and not is_word(self.merged):
            raise bad_option("merged", "a folder or a hub id", self.merged)
        if self.merge is not None and not isinstance(self.merge, MergeStep):
            self.merge = from_mapping(MergeStep, self.merge, "`merge`")

    def _check_quantize(self) -> None:
        if not isinstance(self.quantize, Mapping):
            raise bad_option("quantize", "a mapping of EPMQConfig's options", self.quantize)
        for name, place in (
            ("experts", "The experts belong at the top of the recipe."),
            ("data_free", "Write `calibration: {name: data_free}` for an expert without rows."),
        ):
            if name in self.quantize:
                raise EPMQInputError(
                    f"`quantize.{name}` is no option of a recipe.",
                    code="EPMQ-O02",
                    subject=f"`quantize.{name}`",
                    remedy=place,
                )

    def _check_lineage(self) -> None:
        """It goes into the checkpoint's JSON, which is written after hours."""
        remedy = "Leave it out where it is not known."
        if not isinstance(self.lineage, Mapping):
            raise bad_option("lineage", "a mapping", self.lineage, remedy)
        try:
            json.dumps(dict(self.lineage), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise bad_option("lineage", "data that JSON can hold", self.lineage, remedy) from error

    # ---- calibration ---------------------------------------------------------------------------

    @property
    def data_free(self) -> list[str]:
        """The experts that have no calibration rows."""
        if isinstance(self.calibration, TaggedSource):
            return list(self.calibration.data_free)
        return [name for name, sources in self.calibration.items() if sources == DATA_FREE]

    @property
    def row_sources(self) -> list[RowSource]:
        """Every source of calibration rows."""
        if isinstance(self.calibration, TaggedSource):
            return [self.calibration]
        lists = [each for each in self.calibration.values() if each != DATA_FREE]
        return [source for sources in lists for source in sources]

    # ---- places --------------------------------------------------------------------------------

    def place(self, spec: str) -> Path:
        """The path that ``spec`` means in this recipe."""
        return resolve_path(spec, self.folder).absolute()

    def source(self, spec: str) -> str:
        """A model's folder as a path, or its hub id as it is."""
        path = self.place(spec)
        if "+" in spec and not exists(path):  # base+adapter
            base, _, adapter = spec.partition("+")
            return f"{self.source(base.strip())}+{self.source(adapter.strip())}"
        # A folder `org` with other models of theirs does not make `org/name` a path.
        is_path = exists(path) or parse_hub_id(spec) is None
        return str(path) if is_path else spec

    def config(self) -> EPMQConfig:
        """The options of the quantization; importing them takes GPTQModel's seconds.

        Raises:
            EPMQInputError: an option of ``quantize`` or an expert's name is refused.
        """
        from . import EPMQConfig

        options = dict(self.quantize)
        options["experts"] = {name: self.source(spec) for name, spec in self.experts.items()}
        if self.data_free:
            options["data_free"] = self.data_free
        if is_word(options.get("base")):
            options["base"] = self.source(options["base"])
        try:
            return EPMQConfig.from_options(options)
        except EPMQInputError as error:
            raise error.within("`quantize`") from error

    # ---- plain data ----------------------------------------------------------------------------

    def to_options(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data, with the format's version."""
        options = {"version": self.version} | to_mapping(self)
        options["experts"] = dict(self.experts)
        if isinstance(self.calibration, TaggedSource):
            options["calibration"] = to_mapping(self.calibration)
        else:
            options["calibration"] = {
                name: each if each == DATA_FREE else [to_mapping(source) for source in each]
                for name, each in self.calibration.items()
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
            text = path.read_text(encoding="utf-8-sig")
            data = (parse_json if path.suffix.lower() == ".json" else parse_yaml)(text)
        except EPMQInputError as error:
            raise error.within(f"recipe `{path.name}`") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise EPMQInputError(
                f"recipe `{path.name}` is not readable: {reason}.",
                code="EPMQ-O04",
                subject=f"recipe `{path.name}`",
                remedy="Give a YAML file, or a JSON file named .json.",
            ) from error
        return cls.from_options(data, path.parent)

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return write_yaml(self.to_options())

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2, ensure_ascii=False)


def recipe_help() -> list[tuple[str, str]]:
    """(key, documentation) of everything a recipe may hold, nested keys with their path."""
    blocks = {"merge": [MergeStep], "calibration": [RowSource, TaggedSource]}
    lines: list[tuple[str, str]] = []
    for key, doc in documented(Recipe).items():
        lines.append((key, doc))
        nested = {
            name: text for block in blocks.get(key, ()) for name, text in documented(block).items()
        }
        lines += [(f"  {name}", text) for name, text in nested.items()]
    return lines
