"""SHA-256 of files, kept beside a checkpoint: experts are hashed once, not at each attempt."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from .. import checkpoints

NAME = "digests.json"


@contextlib.contextmanager
def remembered(folder: Path) -> Iterator[None]:
    """Within: files that an earlier attempt hashed, and that were not changed, are not read again.

    A file is the same by its place, size, time of change and inode. A list that cannot be read or
    written costs time only.
    """
    known = checkpoints.known_digests
    with contextlib.suppress(OSError, ValueError, TypeError):
        for path, size, changed, inode, digest in json.loads((folder / NAME).read_text("utf-8")):
            known.setdefault((Path(path), int(size), int(changed), int(inode)), str(digest))
    yield
    entries = [[str(path), *state, digest] for (path, *state), digest in known.items()]
    with contextlib.suppress(OSError, ValueError):
        partial = folder / f".{NAME}"
        partial.write_text(json.dumps(entries), encoding="utf-8")
        partial.replace(folder / NAME)
