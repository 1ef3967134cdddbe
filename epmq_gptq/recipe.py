"""A recipe: everything about one quantization run, in one YAML file.

Reading and checking it needs neither torch nor GPTQModel, so that a mistake is told at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from .calibration.sources import DATA_FREE, RowSource, TaggedSource, recipe_calibration
from .errors import EPMQInputError
from .io.declared import (
    Count,
    Declared,
    Whole,
    Word,
    bad_option,
    is_word,
    ruled,
    shown,
    validated,
)
from .io.hub import parse_hub_id
from .io.yaml_files import exists, read_data, resolve_path, write_yaml

if TYPE_CHECKING:
    from .config import EPMQConfig

RECIPE_VERSION = 1
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
ModelName = Annotated[str, ruled("a folder or a hub id", is_word)]


class MergeStep(Declared):
    """How the merged model is made from the recipe's experts.

    Raises:
        EPMQInputError: an option of the wrong type; the method checks its own parameters.
    """

    method: Word = Field(description="merge method; `epmq-gptq methods` lists them")
    base: Word | None = Field(None, description="folder or hub id the experts were fine-tuned from")
    parameters: dict[str, Any] = Field({}, description="options of the method")
    keep: Word | None = Field(
        None,
        description="folder that keeps the merged model; default: a temporary one beside --out",
    )


class Recipe(Declared):
    """What ``epmq-gptq quantize`` runs.

    Paths stay as they are written; :meth:`place` and :meth:`source` resolve them against
    :attr:`folder`, which is that of the recipe's file and no part of the recipe.

    Raises:
        EPMQInputError: naming the key, the rule, what was got and the remedy.
    """

    model_config = ConfigDict(frozen=False)

    experts: dict[Word, ModelName] = Field(
        description="name -> folder or hub id `org/name@revision` of each model that was merged"
    )
    calibration: Any = Field(
        description="expert -> file name, mapping of the options below, a list of these, or "
        "`data_free` for an expert without rows; or one mapping with `expert_column` for all "
        "experts"
    )
    merged: ModelName | None = Field(None, description="folder or hub id of the merged model")
    merge: MergeStep | None = Field(
        None, description="instead of `merged`: merge the experts first"
    )
    quantize: dict[str, Any] = Field(
        {},
        description="any option of EPMQConfig: bits, group_size, profile, alpha, eta, rho, sym, "
        "desc_act, dynamic, lm_head, on_bad_module, ...",
    )
    seed: Whole = Field(0, description="of the drawing of calibration rows (default 0)")
    batch_size: Count = Field(1, description="calibration rows per forward pass (default 1)")
    dtype: Dtype | None = Field(
        None,
        description="of the computation: auto, float32, bfloat16, float16; default: float32 on a "
        "CPU, GPTQModel's choice on a GPU",
    )
    lineage: dict[Any, Any] = Field(
        {},
        description="what is known of how `merged` was made; goes into the checkpoint's record "
        "(`--write-recipe` writes it)",
    )
    version: Whole = Field(RECIPE_VERSION, description="of the recipe's format (1)")
    _folder: Path = PrivateAttr(default=Path())

    @field_validator("experts", mode="before")
    @classmethod
    def _some_experts(cls, experts: Any) -> Any:
        if not isinstance(experts, dict) or not experts:
            raise EPMQInputError(
                "`experts` should map at least one name to a folder or hub id, got "
                f"{shown(experts)}.",
                code="EPMQ-F20",
                subject="`experts`",
                remedy="For example `experts: {math: org/math-expert@revision}`.",
            )
        return experts

    @field_validator("quantize")
    @classmethod
    def _no_own_places(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, remedy in (
            ("experts", "The experts belong at the top of the recipe."),
            ("data_free", "Write `calibration: {name: data_free}` for an expert without rows."),
        ):
            if name in options:
                raise EPMQInputError(
                    f"`quantize.{name}` is no option of a recipe.",
                    code="EPMQ-O02",
                    subject=f"`quantize.{name}`",
                    remedy=remedy,
                )
        return options

    @field_validator("lineage")
    @classmethod
    def _writable(cls, lineage: dict[Any, Any]) -> dict[Any, Any]:
        """It goes into the checkpoint's JSON, which is written after hours."""
        try:
            json.dumps(lineage, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            remedy = "Leave it out where it is not known."
            raise bad_option("lineage", "data that JSON can hold", lineage, remedy) from error
        return lineage

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.version != RECIPE_VERSION:
            raise bad_option(
                "version",
                f"{RECIPE_VERSION}",
                self.version,
                "This recipe was written for another version of epmq_gptq: use that one.",
                "EPMQ-O04",
            )
        if (self.merged is None) == (self.merge is None):
            raise EPMQInputError(
                "exactly one of `merged` (a model) and `merge` (how to make it) should be given, "
                f"got {'neither' if self.merge is None else 'both'}.",
                code="EPMQ-O03",
                subject="`merged`, `merge`",
                remedy="Give the one that you have.",
            )
        self.calibration = recipe_calibration(self.calibration, list(self.experts))
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_options() == other.to_options()

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

    # ---- paths ---------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """What relative paths are relative to."""
        return self._folder

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
        from .config import EPMQConfig

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
        options = {"version": self.version} | self.given()
        if isinstance(self.calibration, TaggedSource):
            options["calibration"] = self.calibration.given()
        else:
            options["calibration"] = {
                name: each if each == DATA_FREE else [source.given() for source in each]
                for name, each in self.calibration.items()
            }
        if self.merge is not None:
            options["merge"] = self.merge.given()
        return options

    @classmethod
    def from_options(cls, options: Any, folder: str | Path = "") -> Recipe:
        """The inverse of :meth:`to_options`; ``folder`` is what relative paths are relative to."""
        recipe = validated(cls, options, "recipe")
        recipe._folder = Path(folder)
        return recipe

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """From a YAML file, or a JSON file named ``.json``."""
        path = Path(path)
        data = read_data(path, f"recipe `{path.name}`")
        return cls.from_options(data, path.parent)

    def to_yaml(self) -> str:
        """:meth:`to_options` as YAML."""
        return write_yaml(self.to_options())

    def to_json(self) -> str:
        """:meth:`to_options` as JSON."""
        return json.dumps(self.to_options(), indent=2, ensure_ascii=False)


def recipe_help() -> list[tuple[str, str]]:
    """(key, documentation) of everything a recipe may hold, nested keys with their path."""
    blocks = {"merge": MergeStep, "calibration": TaggedSource}
    lines: list[tuple[str, str]] = []
    for key, field in Recipe.model_fields.items():
        lines.append((key, field.description))
        if key in blocks:
            fields = blocks[key].model_fields.items()
            lines += [(f"  {name}", inner.description) for name, inner in fields]
    return lines
