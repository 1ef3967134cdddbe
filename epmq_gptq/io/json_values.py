"""Values out of somebody's JSON: each is of its type, or refused with the file and key named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import EPMQInputError


class JsonValues:
    """A JSON object and where in which file it stands.

    Args:
        values: the object.
        file: how errors call the file.
        remedy: what to do about a wrong value.
        place: the key under which it stands, "" for the whole file.

    Raises:
        EPMQInputError: ``values`` is no object; so does every method where a value is not as asked.
    """

    def __init__(self, values: Any, *, file: str, remedy: str, place: str = ""):
        self._file, self._remedy, self._place = file, remedy, place
        if not isinstance(values, Mapping):
            raise self.refusal("", "an object", values)
        self.values = values

    def refusal(self, key: str, wanted: str, got: Any) -> EPMQInputError:
        """The error for the value of ``key``."""
        path = ".".join(part for part in (self._place, key) if part)
        subject = f"`{path}`" if path else "the file"
        return EPMQInputError(
            f"`{self._file}`: {subject} should be {wanted}, got {_shown(got)}.",
            code="EPMQ-F53",
            subject=f"`{self._file}`",
            remedy=self._remedy,
        )

    def inside(self, key: str, *, needed: bool = True) -> JsonValues:
        """The object under ``key``; an empty one for one that is not there and not needed."""
        values = self.values.get(key)
        if values is None and not needed:
            values = {}
        return self._at(key, values)

    def each(self, key: str) -> list[JsonValues]:
        """The objects of the list under ``key``."""
        values = self.values.get(key)
        if not isinstance(values, list):
            raise self.refusal(key, "a list", values)
        return [self._at(f"{key}[{number}]", value) for number, value in enumerate(values)]

    def _at(self, key: str, values: Any) -> JsonValues:
        place = ".".join(part for part in (self._place, key) if part)
        return JsonValues(values, file=self._file, remedy=self._remedy, place=place)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.refusal(key, "a text", value)
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false", value)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, not below 0."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refusal(key, "a whole number, 0 or more", value)
        return value

    def integer(self, key: str) -> int:
        """A whole number; one group for all columns has the size -1."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(key, "a whole number", value)
        return value

    def number(self, key: str, *, least: float | None = None) -> float:
        """A finite number."""
        value = self.number_or_none(key, least=least)
        if value is None:
            raise self.refusal(key, "a number", None)
        return value

    def number_or_none(self, key: str, *, least: float | None = None) -> float | None:
        """A finite number, None for null and for a key that is not there."""
        value = self.values.get(key)
        if value is None:
            return None
        try:
            # A JSON integer can be larger than any float.
            known = not isinstance(value, bool) and math.isfinite(value)
        except (OverflowError, TypeError):
            known = False
        if not known or (least is not None and value < least):
            bound = "" if least is None else f", {least:g} or more"
            raise self.refusal(key, f"a finite number{bound}", value)
        return float(value)

    def numbers(self, key: str) -> dict[str, float]:
        """The object under ``key`` with a finite number for each name; {} where there is none."""
        inside = self.inside(key, needed=False)
        return {name: inside.number(name) for name in inside.values}

    def counts(self, key: str) -> dict[str, int]:
        """The object under ``key`` with a whole number for each name; {} where there is none."""
        inside = self.inside(key, needed=False)
        return {name: inside.count(name) for name in inside.values}


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
