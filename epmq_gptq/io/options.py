"""Dataclasses as blocks of a file: built from plain data, written back, documented by their fields.

A field's ``metadata["doc"]`` is its documentation, here and in the CLI's help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..errors import EPMQInputError
from .declared import closest, shown

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, *, doc: str, factory: Any = None) -> Any:
    """A dataclass field that carries its documentation."""
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def documented(cls: type) -> dict[str, str]:
    """Option → documentation, in the order of the fields."""
    return {f.name: f.metadata["doc"] for f in dataclasses.fields(cls) if "doc" in f.metadata}


def check_keys(data: Any, known: Iterable[str], what: str) -> None:
    """Refuse anything but a mapping of known keys.

    Raises:
        EPMQInputError: naming the key and the one that was probably meant.
    """
    known = list(known)
    if not isinstance(data, Mapping):
        raise EPMQInputError(
            f"{what} should be a mapping, got {shown(data)}.",
            code="EPMQ-O01",
            subject=what,
            remedy=f"Its keys are {', '.join(known)}.",
        )
    for key in data:
        if key not in known:
            meant = closest(key, known)
            raise EPMQInputError(
                f"{what}: `{str(key)[:80]}` is not an option.",
                code="EPMQ-O02",
                subject=what,
                remedy=f"Did you mean `{meant}`?" if meant else f"Known: {', '.join(known)}.",
            )


def from_mapping(cls: type[T], data: Any, what: str) -> T:
    """Build a documented dataclass.

    Raises:
        EPMQInputError: an unknown or a missing key, or what the class itself refuses.
    """
    check_keys(data, documented(cls), what)
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in data:
            raise EPMQInputError(
                f"{what}: `{field.name}` is missing.",
                code="EPMQ-O03",
                subject=what,
                remedy=f"Give it: {field.metadata['doc']}.",
            )
    try:
        return cls(**data)
    except EPMQInputError as error:
        raise error.within(what) from error


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
