"""SHA-256 of files, kept beside a checkpoint: experts are hashed once, not at each attempt."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import EPMQError
from ...io.checkpoints import Checkpoint, known_digests
from ...io.output import write_whole

NAME = "digests.json"


@contextlib.contextmanager
def remembered(folder: Path, models: Iterable[Checkpoint]) -> Iterator[None]:
    """Within: files that an earlier attempt hashed, and that were not changed, are not read again.

    A file is the same by its place, size, time of change and inode. A list that cannot be read or
    written costs time only.

    Args:
        folder: of the checkpoint.
        models: whose digests will be asked for.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        for path, size, changed, inode, digest in json.loads((folder / NAME).read_text("utf-8")):
            key = Path(path), int(size), int(changed), int(inode)
            known_digests.setdefault(key, str(digest))
    yield
    files = {file for model in models for file in model.files.values()}
    entries = [
        [str(path), *state, digest]
        for (path, *state), digest in known_digests.items()
        if path in files
    ]
    with contextlib.suppress(EPMQError, ValueError):
        write_whole(folder / NAME, json.dumps(entries))
