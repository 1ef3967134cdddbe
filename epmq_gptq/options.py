"""Dataclasses as blocks of a file: built from plain data, written back, documented by their fields.

A field's ``metadata["doc"]`` is its documentation, here and in the CLI's help.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import EPMQInputError

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, *, doc: str, factory: Any = None) -> Any:
    """A dataclass field that carries its documentation."""
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def documented(cls: type) -> dict[str, str]:
    """Option → documentation, in the order of the fields."""
    return {f.name: f.metadata["doc"] for f in dataclasses.fields(cls) if "doc" in f.metadata}


def closest(key: Any, known: Iterable[str]) -> str | None:
    """The known key that ``key`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(str(key), list(known), n=1)), None)


def check_keys(data: Any, known: Iterable[str], what: str) -> None:
    """Refuse anything but a mapping of known keys.

    Raises:
        EPMQInputError: naming the key and the one that was probably meant.
    """
    known = list(known)
    if not isinstance(data, Mapping):
        raise EPMQInputError(
            f"{what} should be a mapping with keys of {', '.join(known)}; got {data!r}."
        )
    for key in data:
        if key not in known:
            meant = closest(key, known)
            hint = f"Did you mean `{meant}`?" if meant else f"Known: {', '.join(known)}."
            raise EPMQInputError(f"{what}: `{key}` is not an option. {hint}")


def from_mapping(cls: type[T], data: Any, what: str) -> T:
    """Build a documented dataclass.

    Raises:
        EPMQInputError: an unknown or a missing key, or what the class itself refuses.
    """
    check_keys(data, documented(cls), what)
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in data:
            raise EPMQInputError(f"{what}: `{field.name}` is missing: {field.metadata['doc']}")
    try:
        return cls(**data)
    except EPMQInputError as error:
        raise EPMQInputError(f"{what}: {error}") from error


def to_mapping(block: Any) -> dict[str, Any]:
    """The inverse of :func:`from_mapping`: the options that differ from their defaults."""
    return {
        field.name: getattr(block, field.name)
        for field in dataclasses.fields(block)
        if "doc" in field.metadata and getattr(block, field.name) != _default(field)
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_count(value: Any) -> bool:
    """A positive int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def resolve_path(spec: str, folder: Path) -> Path:
    """A path as it is meant in a file of ``folder``."""
    return folder / Path(spec).expanduser()


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice, and ``1e-3`` read as a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key != "<<" and key in seen:
                raise EPMQInputError(
                    f"line {key_node.start_mark.line + 1}: `{key}` is given twice; keep one."
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML as plain data.

    Raises:
        EPMQInputError: not YAML, or a key given twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error)
        raise EPMQInputError(f"{place}not readable as YAML: {reason}.") from error
