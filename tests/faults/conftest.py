"""Faults injected by real means; `table.py` makes docs/reliability.md's table of their markers."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keeps these slow tests out of `pytest tests`: name this folder or `-m fault`."""
    paths = [Path(arg.split("::")[0]).absolute() for arg in config.args]
    asked = any(path == HERE or HERE in path.parents for path in paths)
    return None if asked or config.option.markexpr == "fault" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here says which fault it is about."""
    for item in items:
        if HERE in item.path.parents:
            assert item.get_closest_marker("fault"), f"{item.nodeid} names no fault"
