"""YAML and JSON as plain data, read carefully: no key twice, no aliases without an end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..errors import EPMQInputError


def exists(path: Path) -> bool:
    """Whether there is something; nothing is where a name is longer than names may be."""
    try:
        return path.exists()
    except OSError:
        return False


def resolve_path(spec: str, folder: Path) -> Path:
    """A path as it is meant in a file of ``folder``.

    Raises:
        EPMQInputError: it starts with the home of a user that this machine does not know.
    """
    try:
        return folder / Path(spec).expanduser()
    except RuntimeError as error:
        raise EPMQInputError(
            f"`{spec}` starts in a home folder that this machine does not have.",
            code="EPMQ-O01",
            subject=f"`{spec}`",
            remedy="Write the path out.",
        ) from error


# What aliases may make of a file, in characters: more is no recipe, but a way to fill the memory.
_MOST_CHARACTERS = 10_000_000


class _Loader(yaml.SafeLoader):
    """YAML as JSON has it, and without two traps: a key given twice, ``1e-3`` read as a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key != "<<" and key in seen:
                raise _given_twice(key, f"line {key_node.start_mark.line + 1}: ")
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads as the same."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Outside of double quotes these separators read back as spaces.
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"),
        list("-+0123456789"),
    )
# Records are JSON, which has no dates and sets: a date stays the text that it is.
_TIME = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] != _TIME]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _name in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.construct_undefined)


def write_yaml(data: Any) -> str:
    """Plain data as YAML that :func:`parse_yaml` reads as the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(text: str) -> Any:
    """JSON as plain data.

    Raises:
        EPMQInputError: not JSON, or a key given twice in one mapping.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            key = next(key for key in keys if keys.count(key) > 1)
            raise _given_twice(key, "")
        return data

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except EPMQInputError:
        raise
    except (ValueError, RecursionError) as error:
        raise EPMQInputError(
            f"not readable as JSON: {str(error).rstrip('.')}.",
            code="EPMQ-O04",
            subject="JSON",
            remedy="Correct it.",
        ) from error


def read_data(path: Path, what: str, parse: Callable[[str], Any] | None = None) -> Any:
    """What a file of YAML or JSON holds.

    Args:
        path: of the file.
        what: how errors call it.
        parse: :func:`parse_yaml` or :func:`parse_json`; None goes by the file's name.

    Raises:
        EPMQInputError: it cannot be read, or as of ``parse``.
    """
    parse = parse or (parse_json if path.suffix.lower() == ".json" else parse_yaml)
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except EPMQInputError as error:
        raise error.within(what) from error
    except (OSError, ValueError) as error:
        # The reason alone: the message of an OSError holds the whole path.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EPMQInputError(
            f"{what} is not readable: {reason}.",
            code="EPMQ-O04",
            subject=what,
            remedy="Give a YAML file, or a JSON file named .json.",
        ) from error


def _given_twice(key: str, place: str) -> EPMQInputError:
    return EPMQInputError(
        f"{place}`{key[:80]}` is given twice.",
        code="EPMQ-O04",
        subject=f"`{key[:80]}`",
        remedy="Keep one.",
    )


def parse_yaml(text: str) -> Any:
    """YAML as plain data, all of which JSON can hold.

    Raises:
        EPMQInputError: not YAML, a key given twice in one mapping, or aliases without an end.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
        if _characters(data, {}) > _MOST_CHARACTERS + len(text):
            raise ValueError("its aliases make it far larger than it is")
        return data
    except EPMQInputError:
        raise
    except Exception as error:
        # Besides YAMLError the constructors of YAML's own tags raise whatever they meet:
        # `!!bool x` a KeyError, `2020-13-01` a ValueError, a thousand brackets a RecursionError.
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise EPMQInputError(
            f"{place}not readable as YAML: {reason.rstrip('.')}.",
            code="EPMQ-O04",
            subject="YAML",
            remedy="Correct it there." if mark is not None else "Correct it.",
        ) from error


def _characters(value: Any, known: dict[int, int | None]) -> int:
    """About how long it is when aliases are written out."""
    if not isinstance(value, (dict, list)):
        return len(value) if isinstance(value, str) else 1
    if id(value) not in known:
        known[id(value)] = None
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_characters(part, known) for part in parts)
    characters = known[id(value)]
    if characters is None:
        raise ValueError("it contains itself")
    return characters
