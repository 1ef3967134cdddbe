"""The folder that a merge or a save writes: whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..errors import EPMQError, EPMQInputError, EPMQWarning
from .folders import cache_repository, reason_of
from .interrupts import handled, terminated

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        taken = target.is_dir() and any(target.iterdir())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise refusal(f"be a folder that can be reached: {reason_of(error)}") from error
    for what, folder in inputs.items():
        source = cache_repository(folder) or folder.resolve()
        if _lies_in(target, source) or _lies_in(source, target):
            raise refusal(
                f"lie outside of every input, got `{target.name}`, which is, contains or lies "
                f"inside the folder of the {what}"
            )
    try:
        settle(target)
    except OSError as error:
        raise refusal(
            f"be a folder that can be written, but what a process that was killed left beside "
            f"`{target.name}` cannot be cleared up: {reason_of(error)}"
        ) from error
    exists, is_folder = target.exists(), target.is_dir()
    taken = is_folder and any(target.iterdir())  # or was put back
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
    return any(_same(part, folder) for part in (path, *path.parents))


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
    parent = next(path for path in target.parents if path.exists())
    probe = parent / _probe(target).name
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
    free = shutil.disk_usage(_existing(target)).free
    if free < needed:
        raise EPMQInputError(
            f"`{option}` should be on a disk with {needed:,} bytes free, got {free:,}.",
            code="EPMQ-F44",
            subject=f"`{option}`",
            remedy=remedy,
        )


class Need(NamedTuple):
    """Bytes that a run writes to one disk.

    Attributes:
        path: absolute; something on the disk.
        size: in bytes.
        what: how errors call what is written.
    """

    path: Path
    size: int
    what: str


def check_disks(needs: Iterable[Need], *, option: str, remedy: str) -> None:
    """Refuse disks that have less free than all that goes to each of them together.

    Raises:
        EPMQInputError: naming both numbers and what is written there.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_existing(need.path).stat().st_dev, []).append(need)
    for members in disks.values():
        total = sum(need.size for need in members)
        free = shutil.disk_usage(_existing(members[0].path)).free
        if free < total:
            parts = ", ".join(f"{need.size:,} for {need.what}" for need in members)
            raise EPMQInputError(
                f"{option} needs a disk with {total:,} bytes free, got {free:,} ({parts}).",
                code="EPMQ-F44",
                subject=option,
                remedy=remedy,
            )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


@contextmanager
def new_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A hidden folder beside ``target`` that takes its name when the block ends well, else goes.

    What stood at ``target`` is kept aside until the new folder stands. A process that is killed
    between these two renames leaves it there, and :func:`settle` puts it back.

    Args:
        target: absolute.
        overwrite: replace a folder that holds something, once the new one is finished.

    Raises:
        EPMQError: the disk ran full; nothing is left of what was written.
        EPMQInputError: another process writes there, or has written there meanwhile.
    """
    missing = [path for path in target.parents if not path.exists()]
    try:
        with _ended_by_sigterm(), claimed(hidden(target, "partial"), target) as partial:
            _settle_former(target)
            try:
                yield partial
                for file in [*partial.rglob("*"), partial]:
                    _sync(file)
                _rename(partial, target, overwrite)
                _sync(target.parent)
            finally:
                with contextlib.suppress(OSError):  # the next save tries again
                    _settle_former(target)
    except Exception as error:
        if not ran_full(error):
            raise
        raise full_disk(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # one that holds something stays
            for path in missing:
                path.rmdir()


def settle(target: Path) -> None:
    """Clear up beside ``target`` after a process that was killed while it wrote there.

    What it had not finished, a temporary merge included, is removed; a folder that it had moved
    aside is put back.

    Raises:
        EPMQInputError: a process writes there now.
    """
    if not target.name:  # the root
        return
    partial, former, merge = (hidden(target, state) for state in ("partial", "former", "merge"))
    if merge.exists() or _lock_file(merge).exists():
        # That of a run that goes on stays.
        with contextlib.suppress(EPMQInputError), claimed(merge, target):
            pass
    if any(os.path.lexists(path) for path in (partial, former, _lock_file(partial))):
        with claimed(partial, target):
            _settle_former(target)


@contextmanager
def claimed(folder: Path, target: Path) -> Iterator[Path]:
    """An empty folder that only this process writes to; whatever is in it at the end goes.

    The lock is a file beside it; the system drops it with the process, however that ends.

    Args:
        folder: hidden, see :func:`hidden`.
        target: what it is written for; named in the error.

    Raises:
        EPMQInputError: another process has it, or it is not of a run of this user.
    """
    with _locked(folder, target):
        if _is_ours(folder):
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            # Whatever stopped the run, an interrupt included, leaves nothing behind.
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    file = _lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise EPMQInputError(
            f"another process is writing to `{target.name}` now.",
            code="EPMQ-F45",
            subject=f"`{target.name}`",
            remedy="Wait for it, or choose another folder.",
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_ours(folder: Path) -> bool:
    """Whether a run of this user left it; False where nothing is there.

    Raises:
        EPMQInputError: in a place where all may write, somebody else put it there.
    """
    try:
        state = os.lstat(folder)
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid():
        return True
    raise EPMQInputError(
        f"`{folder.name}` is no folder of a run of yours.",
        code="EPMQ-F45",
        subject=f"`{folder.name}`",
        remedy="Look at it and remove it, or choose another place.",
    )


def _rename(partial: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; what stood there is moved aside before."""
    former = hidden(target, "former")
    if overwrite and target.exists():
        os.replace(target, former)
    try:
        os.replace(partial, target)  # in the place of an empty one, too
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise EPMQInputError(
            f"something was written to `{target.name}` during the run.",
            code="EPMQ-F45",
            subject=f"`{target.name}`",
            remedy="Save to another folder, or let it be replaced (`overwrite=True`, "
            "`--overwrite`).",
        ) from error
    shutil.rmtree(former, ignore_errors=True)


def _settle_former(target: Path) -> None:
    """Remove the folder that was moved aside, or put it back where no new one stands."""
    former = hidden(target, "former")
    if not _is_ours(former):
        return
    if target.exists():
        shutil.rmtree(former)
        return
    os.replace(former, target)
    warnings.warn(
        EPMQWarning(
            f"a save to `{target.name}` was cut off while it replaced the folder that stood there; "
            "that one was put back.",
            code="EPMQ-S02",
        ),
        stacklevel=2,
    )


def _ended_by_sigterm() -> contextlib.AbstractContextManager[None]:
    """Within, SIGTERM ends the process by an exception, so that it clears up behind itself.

    Where somebody handles the signal already, it is left to them.
    """
    return handled(terminated, signal.SIGTERM, instead_of=signal.SIG_DFL)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is whole or, if anything goes wrong, as it was before.

    Raises:
        EPMQError: the disk ran full.
    """
    partial = _probe(file)
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        os.replace(partial, file)
    except OSError as error:
        if ran_full(error):
            raise full_disk(file, error) from error
        raise EPMQInputError(
            f"`{file.name}` cannot be written: {reason_of(error)}.",
            code="EPMQ-F45",
            subject=f"`{file.name}`",
            remedy="Choose another place.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def full_disk(target: Path, error: Exception) -> EPMQError:
    """The error for an exception of which :func:`ran_full` is true."""
    cause = f"the disk of `{target.name}` ran full"
    if _has_number(error, (errno.EFBIG,)):
        cause = f"the system lets no file at `{target.name}` grow that large (a limit of the user's"
        cause += " or of the file system)"
    return EPMQError(
        f"{cause}; nothing was left there.",
        code="EPMQ-F44",
        subject=f"`{target.name}`",
        remedy="Free some space or choose another disk, and try again.",
    )


def ran_full(error: Exception) -> bool:
    """Whether an exception says that there was no room for what was being written."""
    return _has_number(error, _NO_SPACE)


def _has_number(error: Exception, numbers: Sequence[int]) -> bool:
    # safetensors reports the system's number in words only.
    words = [f"os error {number}" for number in numbers]
    return getattr(error, "errno", None) in numbers or any(w in str(error) for w in words)


def hidden(target: Path, state: str) -> Path:
    """The hidden path beside ``target`` of a folder that is "partial", "former" or "merge"."""
    return target.with_name(f".{target.name}.{state}")


def _probe(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do it for folders, and say so.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
