"""A quantization in processes of its own, which the tests kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from judge import stored

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "GPTQMODEL_CPU_WORKERS": "2",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "200",
    }


class Job:
    """One run, attempted in processes of its own."""

    def __init__(self, folder: Path, merged: Path, experts: dict[str, Path], rows, **options):
        self.folder = folder
        self.root, self.out, self.told = (folder / name for name in ("unfinished", "out", "told"))
        self.spec = {
            "merged": str(merged),
            "experts": {name: str(path) for name, path in experts.items()},
            "rows": rows,
            "options": options,
            "root": str(self.root),
            "out": str(self.out),
            "told": str(self.told),
        }

    def attempt(self, *, temporary: str = "", **changes) -> subprocess.CompletedProcess[str]:
        file = self.folder / "spec.json"
        file.write_text(json.dumps(self.spec | changes))
        self.told.unlink(missing_ok=True)
        return subprocess.run(
            [sys.executable, str(HERE / "child.py"), str(file)],
            capture_output=True,
            text=True,
            env=environment() | ({"TMPDIR": temporary} if temporary else {}),
            cwd=self.folder,
            timeout=300,
        )

    def finished(self, **changes) -> dict:
        done = self.attempt(**changes)
        assert done.returncode == 0, done.stderr[-3000:]
        return stored(Path((self.spec | changes)["out"]))

    def whole(self) -> dict:
        """What an uninterrupted run saves."""
        other = {name: str(self.folder / f"whole-{name}") for name in ("root", "out")}
        return self.finished(**other)
