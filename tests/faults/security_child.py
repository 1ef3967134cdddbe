"""A process that runs the CLI's commands while it watches what is unpickled, run or opened.

``python security_child.py REPORT``: reads a JSON list of commands, runs each as the CLI does, and
writes a JSON object of what was seen into the file REPORT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

seen: dict[str, list] = {"pickle": [], "opened": [], "exits": []}
SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")
HERE = os.getcwd()


def watch(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class":
        seen["pickle"].append([str(argument) for argument in arguments])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(HERE) and path.endswith(SUFFIXES):
            seen["opened"].append(os.path.relpath(path, HERE))


sys.addaudithook(watch)


def main() -> None:
    import numpy
    import torch

    def refuse(*arguments, **options):
        seen["pickle"].append(["torch.load"])
        raise AssertionError("torch.load was called")

    torch.load = refuse
    real = numpy.load

    def load(*arguments, allow_pickle: bool = False, **options):
        if allow_pickle:
            seen["pickle"].append(["numpy.load"])
        return real(*arguments, allow_pickle=allow_pickle, **options)

    numpy.load = load

    from epmq_gptq import cli

    for command in json.load(sys.stdin):
        sys.argv = ["epmq-gptq", *command]
        try:
            cli.main()
            seen["exits"].append(0)
        except SystemExit as end:
            seen["exits"].append(end.code or 0)
    Path(REPORT).write_text(json.dumps(seen))


REPORT = sys.argv[1]
if __name__ == "__main__":
    main()
