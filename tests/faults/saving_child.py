"""A process that quantizes a tiny model once and then saves it in children, to be hurt.

``python saving_child.py MODELS DESCRIPTOR`` reads one JSON object a line, ``{"do": ..., ...}``, and
answers each with one on the descriptor: the host prints to the standard output. Each save runs in a
fork, so that a kill takes a process with it and the model stays.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import tiny

from epmq_gptq import EPMQConfig, EPMQError
from epmq_gptq.host import saving
from epmq_gptq.io import output


def quantized(folder: Path):
    experts = {name: folder / name for name in ("expert0", "expert1")}
    model = tiny.load(folder / "merged", EPMQConfig(group_size=32, experts=experts, alpha=0.1))
    model.quantize({name: tiny.rows(3, 40, seed=1) for name in experts})
    return model


def hurt(moment: str, signum: int) -> None:
    """Let this process get a signal at one moment of a save."""

    def before(owner, name: str, when=lambda *_: True) -> None:
        real = getattr(owner, name)

        def replacement(*arguments, **options):
            if when(*arguments):
                setattr(owner, name, real)  # once
                os.kill(os.getpid(), signum)
            return real(*arguments, **options)

        setattr(owner, name, replacement)

    def after(owner, name: str) -> None:
        real = getattr(owner, name)

        def replacement(*arguments, **options):
            real(*arguments, **options)
            os.kill(os.getpid(), signum)

        setattr(owner, name, replacement)

    if moment == "a shard is written":
        from gptqmodel.utils import model as host

        after(host, "_write_shard_file")
    elif moment == "it is verified":
        before(saving, "verify_checkpoint")
    elif moment == "it is flushed":
        before(output, "_sync")
    elif moment == "just before the two renames":
        before(output.os, "replace", lambda source, _: Path(source).name == "out")
    elif moment == "between the two renames":
        before(output.os, "replace", lambda source, _: Path(source).name == ".out.partial")
    elif moment == "after the two renames":
        before(output.shutil, "rmtree")


def save(
    model, out: str, *, overwrite=False, moment="", signum=0, limit=0, fill="", wait=""
) -> dict:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if fill:  # somebody else's file comes just after the look at the disk
        real = saving.check_space

        def filled(*arguments, **options):
            real(*arguments, **options)
            free = os.statvfs(fill).f_bavail * os.statvfs(fill).f_frsize
            Path(fill, "others").write_bytes(bytes(free - (100 << 10)))

        saving.check_space = filled
    if moment:
        hurt(moment, signum)
    if wait:  # holds its lock until the file is gone
        real_verify = saving.verify_checkpoint

        def verify(*arguments):
            Path(wait).touch()
            while Path(wait).exists():
                pass
            real_verify(*arguments)

        saving.verify_checkpoint = verify
    try:
        model.save(out, overwrite=overwrite, max_shard_size="64KB")
    except EPMQError as error:
        return error.to_dict()
    return {"code": "saved"}


def forked(model, arguments: dict) -> dict:
    """Save in a fork; how that ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(writer, json.dumps(save(model, **arguments)).encode())
            status = 0
        except KeyboardInterrupt:
            status = 130
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    if arguments.get("wait"):
        return {"child": child}
    with os.fdopen(reader) as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status} | (json.loads(text) if text else {})


def main() -> None:
    answers = os.fdopen(int(sys.argv[2]), "w")
    model = quantized(Path(sys.argv[1]))
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        if kind == "save":
            answer = forked(model, request)
        elif kind == "save here":
            answer = save(model, **request)
        else:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["child"], 0)[1])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
