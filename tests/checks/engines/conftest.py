"""Each kind of checkpoint is made once."""

from collections.abc import Callable
from pathlib import Path

import made
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Kind → its folder, see :data:`made.KINDS`."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = made.make(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return of
