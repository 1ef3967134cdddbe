"""The folder that a merge or a save writes: whole or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EPMQInputError(
            f"`{option}` should be on a disk with {needed:,} bytes free, got {free:,}.",
            code="EPMQ-F44",
            subject=f"`{option}`",
            remedy=remedy,
        )


class Need(NamedTuple):
    """Bytes that a run writes to one place.

    Attributes:
        place: absolute; something on the disk.
        size: in bytes.
        what: how errors call what is written.
    """

    place: Path
    size: int
    what: str


def check_disks(needs: Iterable[Need], *, option: str, remedy: str) -> None:
    """Refuse disks that have less free than all that goes to each of them together.

    Raises:
        EPMQInputError: naming both numbers and what is written there.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_existing(need.place).stat().st_dev, []).append(need)
    for members in disks.values():
        total = sum(need.size for need in members)
        free = shutil.disk_usage(_existing(members[0].place)).free
        if free < total:
            parts = ", ".join(f"{need.size:,} for {need.what}" for need in members)
            raise EPMQInputError(
                f"{option} needs a disk with {total:,} bytes free, got {free:,} ({parts}).",
                code="EPMQ-F44",
                subject=option,
                remedy=remedy,
            )


def _existing(place: Path) -> Path:
    return next(one for one in (place, *place.parents) if one.is_dir())


@contextmanager
def new_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A hidden sibling that becomes ``target`` when the block ends well, else disappears.

    At every moment ``target`` is what stood there before or the finished folder, whole. Where the
    system cannot exchange two folders in one step, a process that is killed between two renames
    leaves the former one under a hidden name, and :func:`settle` puts it back.

    Args:
        target: absolute.
        overwrite: replace a folder that holds something, once the new one is finished.

    Raises:
        EPMQError: the disk ran full; nothing is left of what was written.
        EPMQInputError: another process writes there, or has written there meanwhile.
    """
    missing = [place for place in target.parents if not place.exists()]
    try:
        with _stopped_by_sigterm(), _written(target) as partial:
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            _move(partial, target, overwrite)
            _sync(target.parent)
    except Exception as error:
        if not ran_full(error):
            raise
        raise full_disk(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in missing:
                place.rmdir()


def settle(target: Path) -> None:
    """Clear up beside ``target`` after a process that was killed while it wrote there.

    What it had not finished, a temporary merge included, is removed; a folder that it had moved
    aside is put back.

    Raises:
        EPMQInputError: a process writes there now.
    """
    if not target.name:  # the root
        return
    merge = hidden(target, "merge")
    if merge.exists():
        with contextlib.suppress(EPMQInputError), claimed(merge, target):  # ours, or another run's
            pass
    if any(hidden(target, kind).exists() for kind in ("partial", "former")):
        with _written(target):
            pass


@contextmanager
def claimed(folder: Path, target: Path) -> Iterator[Path]:
    """A folder that only this process writes to, empty; whatever is there at the end goes.

    Its name is the same for all, and who holds the lock of the folder itself owns it: the system
    drops a lock with the process that held it, so that a folder without one is of a dead process.

    Args:
        folder: hidden, see :func:`hidden`.
        target: what it is written for; named in the error.

    Raises:
        EPMQInputError: another process has it.
    """
    descriptor = _own(folder, target)
    try:
        _empty(folder)
        yield folder
    finally:
        # Whatever stopped the run, an interrupt included, leaves nothing behind.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """The folder in which ``target`` is made, and beside it nothing that was cut off earlier."""
    former = hidden(target, "former")
    # After an exchange this folder is what stood at the target before.
    with claimed(hidden(target, "partial"), target) as partial:
        _put_back(former, target)
        try:
            yield partial
        finally:
            if target.exists():
                shutil.rmtree(former, ignore_errors=True)


def _own(folder: Path, target: Path) -> int:
    """Make the folder or take over a dead process's; its locked descriptor."""
    while True:
        made = True
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            made = False
        try:
            descriptor = _locked(folder)
        except FileNotFoundError:  # its owner ended between the two calls
            continue
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise _strange(folder) from error
        if descriptor is None:
            raise EPMQInputError(
                f"another process is writing to `{target.name}` now.",
                code="EPMQ-F45",
                subject=f"`{target.name}`",
                remedy="Wait for it, or choose another folder.",
            )
        state = os.fstat(descriptor)
        with contextlib.suppress(FileNotFoundError):
            # Not one that was moved to its name or removed while we waited.
            if os.path.samestat(state, os.lstat(folder)):
                if made or state.st_uid == os.geteuid():
                    return descriptor
                os.close(descriptor)
                raise _strange(folder)
        os.close(descriptor)


def _strange(folder: Path) -> EPMQInputError:
    # Emptying what others put there, in a place that all may write to, could empty anything.
    return EPMQInputError(
        f"`{folder.name}` is no folder of a run of yours.",
        code="EPMQ-F45",
        subject=f"`{folder.name}`",
        remedy="Look at it and remove it, or choose another place.",
    )


def _locked(folder: Path) -> int | None:
    """A descriptor of a folder that holds its lock; None where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks: two writers at once are not told apart there
    return descriptor


def _put_back(former: Path, target: Path) -> None:
    if not former.is_dir() or former.is_symlink():
        return
    if target.exists():  # killed while it removed the former one
        shutil.rmtree(former, ignore_errors=True)
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


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _move(partial: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name."""
    if not overwrite or not target.exists():
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
        return
    # The one that goes is locked as well: under the hidden name it looks like a dead process's.
    descriptor = None
    with contextlib.suppress(OSError):  # one that may not be read
        descriptor = _locked(target)
    try:
        if _exchange(partial, target):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            _move_aside(partial, target)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _move_aside(partial: Path, target: Path) -> None:
    former = hidden(target, "former")
    try:
        os.replace(target, former)
        os.replace(partial, target)
    except BaseException:  # an interrupt between the two as well
        if former.exists() and not target.exists():
            os.replace(former, target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders have each other's name in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a libc without it
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _stopped_by_sigterm() -> contextlib.AbstractContextManager[None]:
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
    """Where a folder for ``target`` is while it is not at its place."""
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
