"""What is known of a merge, and the checks that every reader of it needs.

All of it comes from files that a stranger may have written: nothing is believed to have a type, a
size or an end before it was looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ...errors import EPMQInputError
from ...io.declared import shown
from ...io.hub import parse_hub_id

# Far above any merge in use; a YAML alias can make a few bytes look like gigabytes.
_MAX_VALUES = 10_000
_MAX_DEPTH = 20
MAX_EXPERTS = 1_000
_MAX_NAME = 1_000  # characters
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]+")
_LOCAL = re.compile(r"[/~.\\]|[A-Za-z]:")


@dataclass
class Lineage:
    """How a merge was made, as far as its folder says.

    Attributes:
        tool: who says so: "mergekit", "epmq_gptq" or "model card".
        method: of the merge, in the tool's own words; None where it is not said.
        parameters: of the method, as plain data.
        base: the model that the experts were fine-tuned from: path, hub id or ``base+adapter``.
        experts: name → the same, in the order of the merge.
        weights: name → weight in the merge; None where it is not one number.
        trim: over what a method that trims task vectors ranks their entries: "per tensor" or
            "whole model"; None for a method that does not, or where it is not known.
        tokenizer_source: mergekit's option.
        dtype: the one that the merge was computed in.
        digests: name → SHA-256 of the weights that were merged, where our own record has it.
        base_digest: the same of the base.
        notes: what was left out, or cannot be said in the words above.
    """

    tool: str
    method: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    experts: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float | None] = field(default_factory=dict)
    trim: str | None = None
    tokenizer_source: str | None = None
    dtype: str | None = None
    digests: dict[str, str] = field(default_factory=dict)
    base_digest: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """What may be published: names and revisions, no path of any machine."""
        record: dict[str, Any] = {"tool": self.tool}
        if self.method is not None:
            record["method"] = self.method
        if self.parameters:
            record["parameters"] = published(self.parameters)
        if self.base is not None:
            record["base"] = published(self.base)
        record["experts"] = {name: published(spec) for name, spec in self.experts.items()}
        weights = {name: value for name, value in self.weights.items() if value is not None}
        if weights:
            record["weights"] = weights
        for name in ("trim", "tokenizer_source", "dtype"):
            if getattr(self, name) is not None:
                record[name] = published(getattr(self, name))
        if self.notes:
            record["notes"] = list(self.notes)
        return record

    def described(self) -> str:
        """The method in one line."""
        trim = f", trimmed {self.trim}" if self.trim == "per tensor" else ""
        if self.trim == "whole model":
            trim = ", trimmed over the whole model"
        return f"{self.method or 'a merge'}{trim} (says {self.tool})"


def refusal(what: str, cause: str, remedy: str = "") -> EPMQInputError:
    """The error of a lineage that cannot be used."""
    return EPMQInputError(
        f"{what}: {cause}.",
        code="EPMQ-F35",
        subject=what,
        remedy=remedy
        or "Write a recipe that names the experts (`epmq-gptq quantize recipe.yaml`).",
    )


# ---- values ------------------------------------------------------------------------------------


def plain(value: Any, what: str) -> Any:
    """A copy as JSON data; what JSON has no word for becomes text.

    Raises:
        EPMQInputError: it is deeper or larger than the parameters of any merge.
    """
    left = [_MAX_VALUES]

    def copy(item: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > _MAX_DEPTH:
            raise refusal(what, "its parameters are larger or deeper than those of any merge")
        if item is None or isinstance(item, (bool, str)):
            return item
        if isinstance(item, (int, float)):
            return item if number(item) is not None else shown(item)
        if isinstance(item, Mapping):
            return {key_text(key): copy(each, depth + 1) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [copy(each, depth + 1) for each in item]
        return shown(item)

    return copy(value, 0)


def key_text(key: Any) -> str:
    """A mapping's key as text."""
    return key if isinstance(key, str) else shown(key)


def number(value: Any) -> float | None:
    """A finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def text(value: Any, what: str, key: str) -> str | None:
    """A non-empty string, or None.

    Raises:
        EPMQInputError: it is something else.
    """
    if value is None:
        return None
    is_name = isinstance(value, str) and bool(value.strip()) and value.isprintable()
    if not is_name or len(value) > _MAX_NAME:
        raise refusal(what, f"`{key}` should be a name, got {shown(value)}")
    return value.strip()


# ---- models ------------------------------------------------------------------------------------


def is_local(spec: str) -> bool:
    """Whether a model's spec can only be a path."""
    return _LOCAL.match(spec) is not None or parse_hub_id(spec) is None


def published(value: Any) -> Any:
    """Plain data in which a path has lost its folders."""
    if isinstance(value, Mapping):
        return {key: published(item) for key, item in value.items()}
    if isinstance(value, list):
        return [published(item) for item in value]
    if isinstance(value, str):
        prefix = "model:" if value.startswith("model:") else ""
        parts = value.removeprefix(prefix).split("+")
        return prefix + "+".join(_last_part(part) if _is_path(part) else part for part in parts)
    return value


def _is_path(part: str) -> bool:
    return ("/" in part or "\\" in part) and is_local(part)


def _last_part(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/").rstrip("/")).name


def expert_names(specs: Sequence[str]) -> dict[str, str]:
    """A short name for each model: name → spec, in their order.

    A name is the last part of the id or path (of an adapter, the adapter's), and unique.
    """
    named: dict[str, str] = {}
    for spec in specs:
        model = spec.rpartition("+")[2].partition("@")[0]
        stem = _UNNAMEABLE.sub("-", _last_part(model)).strip("-.")[:60] or "expert"
        name, count = stem, 1
        while name in named:
            count += 1
            name = f"{stem}-{count}"
        named[name] = spec
    return named
