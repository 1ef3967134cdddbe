"""The folder that a merge or a save writes: whole or absent."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import EPMQInputError


def check_output(
    out: Path, inputs: Mapping[str, Path], overwrite: bool, *, option: str = "out"
) -> Path:
    """The absolute output path, if something may be written there.

    Args:
        out: what the caller asked for.
        inputs: how errors call an input → its folder.
        overwrite: whether a non-empty folder may be replaced.
        option: what errors call ``out``.

    Raises:
        EPMQInputError: it is, contains or lies inside an input, is a file, or is not empty.
    """
    target = Path(out).expanduser().resolve()
    for what, folder in inputs.items():
        source = folder.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise EPMQInputError(
                f"`{option}` should lie outside of every input, got `{out}`, which is, "
                f"contains or lies inside the folder of the {what}. Choose another folder."
            )
    if target.exists() and not target.is_dir():
        raise EPMQInputError(f"`{option}` should be a folder, got the file `{out}`.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise EPMQInputError(
            f"`{option}` should be new or empty, got `{out}`, which is neither. Choose another, "
            "or pass `overwrite=True` to replace it."
        )
    return target


def check_space(target: Path, needed: int) -> None:
    """Raise EPMQInputError if the disk of ``target`` has less than ``needed`` bytes free."""
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EPMQInputError(
            f"`out` should be on a disk with {needed:,} bytes free, got {free:,}. Free some space "
            "or choose another disk."
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``target`` when the block ends well, else disappears.

    A folder that stood at ``target`` is moved aside first and deleted last, so that at no moment a
    half-written one bears the name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    partial = target.with_name(f".{target.name}.{tag}.partial")
    former = target.with_name(f".{target.name}.{tag}.former")
    partial.mkdir()
    try:
        yield partial
        for file in [*partial.iterdir(), partial]:
            _sync(file)
        if target.exists():
            os.replace(target, former)
        try:
            os.replace(partial, target)
        except OSError:
            if former.exists():
                os.replace(former, target)
            raise
        _sync(target.parent)
    finally:
        # Whatever stopped the run, an interrupt included, leaves nothing behind.
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
