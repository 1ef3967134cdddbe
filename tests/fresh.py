"""A Python process without this package that loads checkpoints, one after another, as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what threads print is no answer
import gptqmodel, transformers
for line in sys.stdin:
    folder, code = json.loads(line)
    os.chdir(folder)
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
            assert not any(name.startswith("epmq_gptq") for name in sys.modules), "imported"
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


class Reader:
    """The process; it starts with the first code that it is given, and imports GPTQModel once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, folder: Path) -> str:
        """Run code in a working directory and a namespace of its own; what it printed.

        Raises:
            AssertionError: it raised, or imported this package.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=folder,
                env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
            )
        print(json.dumps([str(folder), code]), file=self._process.stdin, flush=True)
        printed, error = json.loads(self._process.stdout.readline())
        assert not error, code + error[-3000:]
        return printed

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
