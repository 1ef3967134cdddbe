"""The folder that a merge or a save writes: whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import EPMQError, EPMQInputError
from .folders import cache_repository, reason_of

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_output(
    out: Path,
    inputs: Mapping[str, Path],
    overwrite: bool,
    *,
    option: str = "out",
    moved_there: bool = True,
) -> Path:
    """The absolute output path, if something may and can be written there.

    Args:
        out: what the caller asked for.
        inputs: how errors call an input → its folder.
        overwrite: whether a non-empty folder may be replaced.
        option: what errors call ``out``.
        moved_there: whether a finished folder will be moved to that name.

    Raises:
        EPMQInputError: it is, contains or lies inside an input or the working folder, is a file,
            is not empty, or cannot be written.
    """

    def refusal(cause: str, remedy: str = "Choose another folder.") -> EPMQInputError:
        return EPMQInputError(
            f"`{option}` should {cause}.", code="EPMQ-F45", subject=f"`{option}`", remedy=remedy
        )

    try:
        target = Path(out).expanduser().resolve()
        exists, is_folder = target.exists(), target.is_dir()
        taken = is_folder and any(target.iterdir())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise refusal(f"be a folder that can be reached: {reason_of(error)}") from error
    for what, folder in inputs.items():
        source = cache_repository(folder) or folder.resolve()
        if _lies_in(target, source) or _lies_in(source, target):
            raise refusal(
                f"lie outside of every input, got `{target.name}`, which is, contains or lies "
                f"inside the folder of the {what}"
            )
    if exists and not is_folder:
        raise refusal(f"be a folder, got the file `{target.name}`")
    if _lies_in(Path.cwd(), target):
        raise refusal("not be the working folder, nor contain it")
    if moved_there and is_folder and target.is_mount():
        # The finished folder is moved to its name, and a file system stays where it is mounted.
        raise refusal(
            f"not be where a file system is mounted, got `{target.name}`", "Choose a folder in it."
        )
    if taken and not overwrite:
        raise refusal(
            f"be new or empty, got `{target.name}`, which is neither",
            "Choose another, or let it be replaced (`overwrite=True`, `--overwrite`).",
        )
    check_writable(target, option=option)
    return target


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether an absolute ``path`` is ``folder`` or in it, however the two are spelled."""
    return any(_same(place, folder) for place in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    # By the file system where both are there: some do not tell cases apart, others are mounted
    # twice.
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def check_writable(target: Path, *, option: str = "out") -> None:
    """Refuse an absolute path at which no folder can be made, by making and removing one.

    Raises:
        EPMQInputError: the nearest existing parent is read-only, or no folder.
    """
    parent = next(place for place in target.parents if place.exists())
    probe = parent / _hidden(target, "partial")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise EPMQInputError(
            f"`{option}` should be a folder that can be written, but `{parent.name}` takes no new "
            f"folder: {reason_of(error)}.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another place.",
        ) from error


def check_space(
    target: Path,
    needed: int,
    *,
    option: str = "out",
    remedy: str = "Free some space or choose another disk.",
) -> None:
    """Refuse a disk on which less than ``needed`` bytes are free.

    Args:
        target: absolute; something on the disk.
        needed: bytes.
        option, remedy: what the error says.

    Raises:
        EPMQInputError: naming both numbers.
    """
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EPMQInputError(
            f"`{option}` should be on a disk with {needed:,} bytes free, got {free:,}.",
            code="EPMQ-F44",
            subject=f"`{option}`",
            remedy=remedy,
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``target`` when the block ends well, else disappears.

    A folder that stood at ``target`` is moved aside first and deleted last, so that at no moment a
    half-written one bears the name.

    Raises:
        EPMQError: the disk ran full; nothing is left of what was written.
    """
    missing = [place for place in target.parents if not place.exists()]
    partial = target.with_name(_hidden(target, "partial"))
    former = target.with_name(_hidden(target, "former"))
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in [*partial.rglob("*"), partial]:
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
    except Exception as error:
        if not ran_full(error):
            raise
        raise _full_disk(target) from error
    finally:
        # Whatever stopped the run, an interrupt included, leaves nothing behind.
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in missing:
                place.rmdir()
    shutil.rmtree(former, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is whole or, if anything goes wrong, as it was before.

    Raises:
        EPMQError: the disk ran full.
    """
    partial = file.with_name(_hidden(file, "partial"))
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        os.replace(partial, file)
    except OSError as error:
        if ran_full(error):
            raise _full_disk(file) from error
        raise EPMQInputError(
            f"`{file.name}` cannot be written: {reason_of(error)}.",
            code="EPMQ-F45",
            subject=f"`{file.name}`",
            remedy="Choose another place.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _full_disk(target: Path) -> EPMQError:
    return EPMQError(
        f"the disk of `{target.name}` ran full; nothing was left there.",
        code="EPMQ-F44",
        subject=f"`{target.name}`",
        remedy="Free some space or choose another disk, and try again.",
    )


def _hidden(target: Path, state: str) -> str:
    return f".{target.name}.{uuid.uuid4().hex[:8]}.{state}"


def ran_full(error: Exception) -> bool:
    """Whether an error says that a disk has no room."""
    # safetensors reports the system's number in words only.
    words = [f"os error {number}" for number in _NO_SPACE]
    return getattr(error, "errno", None) in _NO_SPACE or any(w in str(error) for w in words)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
