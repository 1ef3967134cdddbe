"""Files of calibration rows for the tests."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, *lines: str) -> str:
    """A text file of these lines; its name."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name
