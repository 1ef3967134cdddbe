"""A calibration as it is given, on a shell or in Python, as the block of a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.yaml_files import exists, parse_yaml, read_data, resolve_path
from .sources import DATA_FREE, given_sources, recipe_calibration


def parse_calibration(values: Sequence[str]) -> dict[str, Any]:
    """``--calibration`` as the recipe's block; files as absolute paths.

    Args:
        values: ``name=SPEC`` each; or one alone, a YAML file with the whole block, or the block
            itself in braces.

    Raises:
        EPMQInputError: an expert is given twice, or a file is no block.
    """
    block: dict[str, Any] = {}
    for value in values:
        name, equals, source = value.partition("=")
        is_block = value.lstrip().startswith("{")
        if is_block or not equals:
            if len(values) > 1:
                raise _wrong("what gives all experts theirs goes alone", "Leave the others out.")
            return _written(value) if is_block else _read(Path(value))
        if name in block:
            raise _wrong(f"`{name}` is given twice", "Keep one; `name=[a.jsonl, b.jsonl]` is both.")
        block[name] = parse_source(name, source)
    return block


def _written(text: str) -> dict[str, Any]:
    try:
        block = parse_yaml(text)
    except EPMQInputError as error:
        raise error.within("`--calibration`") from error
    return _checked(block, Path.cwd(), "`{...}`")


def _read(file: Path) -> dict[str, Any]:
    file = resolve_path(str(file), Path())
    if not exists(file):
        cause = f"`{file.name}` cannot be read: No such file"
        raise _wrong(cause, "Give name=FILE, or a YAML file.")
    block = read_data(file, f"`--calibration {file.name}`", parse_yaml)
    return _checked(block, file.parent, f"`{file.name}`")


def _checked(block: Any, folder: Path, what: str) -> dict[str, Any]:
    if isinstance(block, Mapping) and set(block) == {"calibration"}:
        block = block["calibration"]
    if not isinstance(block, Mapping) or not all(isinstance(key, str) for key in block):
        raise _wrong(f"{what} should map experts to sources", "Write it as in a recipe's block.")
    if "expert_column" in block:
        return dict(_absolute(dict(block), folder))
    return {name: _absolute(source, folder) for name, source in block.items()}


def given_calibration(calibration: Any) -> Any:
    """A calibration of Python as a recipe's block: files as absolute paths, rows wrapped."""
    if not isinstance(calibration, Mapping) or "expert_column" in calibration:
        return calibration
    block = {}
    for name, value in calibration.items():
        if isinstance(value, (str, Path)):
            block[name] = _absolute(str(value), Path.cwd())
        else:
            block[name] = given_sources(value, name)
    return block


def check_experts_of(block: Any, experts: Sequence[str]) -> None:
    """Refuse the calibration of an expert that there is not.

    Raises:
        EPMQInputError: naming it.
    """
    if not isinstance(block, Mapping) or "expert_column" in block:
        return
    for name in block:
        if name not in experts:
            raise EPMQInputError(
                f"`--calibration`: `{name}` is not one of the experts "
                f"{', '.join(f'`{expert}`' for expert in experts)}.",
                code="EPMQ-F21",
                subject="`--calibration`",
                remedy="Use these names, or add the expert with `--expert`.",
            )


def _wrong(cause: str, remedy: str) -> EPMQInputError:
    return EPMQInputError(
        f"`--calibration`: {cause}.", code="EPMQ-O01", subject="`--calibration`", remedy=remedy
    )


def parse_source(name: str, value: str) -> Any:
    """One expert's source: YAML in brackets, else a file or ``data_free``.

    Raises:
        EPMQInputError: it is empty, or not YAML.
    """
    value = value.strip()
    if not value:
        raise _wrong(f"`{name}` has no source", "Give a file.")
    if value[0] not in "{[":
        return _absolute(value, Path.cwd())
    try:
        return _absolute(parse_yaml(value), Path.cwd())
    except EPMQInputError as error:
        raise error.within(f"`--calibration {name}`") from error


def _with_files(source: Any, change: Callable[[str], str]) -> Any:
    """A source with the names of its files changed."""
    if isinstance(source, str) and source != DATA_FREE:
        return change(source)
    if isinstance(source, Mapping) and isinstance(source.get("file"), str):
        return {**source, "file": change(source["file"])}
    if isinstance(source, list):
        return [_with_files(item, change) for item in source]
    return source


def _absolute(source: Any, folder: Path) -> Any:
    return _with_files(source, lambda file: str(resolve_path(file, folder).absolute()))


def check_source(name: str, value: str) -> Any:
    """:func:`parse_source`, if it is one that a recipe takes and its file is there.

    Raises:
        EPMQInputError: it is not.
    """
    source = parse_source(name, value)
    if source == DATA_FREE:
        return source
    recipe_calibration({name: source}, [name])
    for item in source if isinstance(source, list) else [source]:
        file = item.get("file") if isinstance(item, Mapping) else item
        if file is not None and not Path(file).is_file():
            raise _wrong(f"there is no file `{Path(file).name}`", "Correct the path.")
    return source


def moved_source(source: Any, folder: Path) -> Any:
    """A source as a file of ``folder`` writes it: what lies in it is relative."""
    folder = folder.absolute()

    def moved(file: str) -> str:
        inside = Path(file).is_absolute() and Path(file).is_relative_to(folder)
        return os.path.relpath(file, folder) if inside else file

    return _with_files(source, moved)
