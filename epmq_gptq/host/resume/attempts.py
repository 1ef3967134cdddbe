"""The folders in which attempts at one run keep what GPTQModel moves out of memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "attempt-", "in-use.lock"


class Attempt:
    """A folder of one attempt, there until :meth:`cleanup` or the end of the process.

    It holds a lock that the system drops when the process dies, however it dies, so that the next
    attempt knows what nobody needs any more.

    Args:
        root: folder of the checkpoint, whose only writer the caller is.

    Attributes:
        path: the folder.
    """

    def __init__(self, root: Path):
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = FileLock(str(self.path / _LOCK), timeout=0)
        lock.acquire()
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def cleanup(self) -> None:
        """Remove the folder; safe to call again."""
        self._remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attempt:
        # The host copies its configuration for every module.
        return self


def _remove(path: Path, lock: FileLock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        lock.release()


def clear_dead(root: Path) -> int:
    """Remove the folders of attempts whose process is gone; how many there were.

    Args:
        root: as for :class:`Attempt`.
    """
    removed = 0
    for folder in sorted(root.glob(f"{_PREFIX}*")):
        lock = FileLock(str(folder / _LOCK), timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):  # in use: a finished run that is not saved yet
            continue
        _remove(folder, lock)
        removed += 1
    return removed
