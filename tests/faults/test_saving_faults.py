"""Saves that are killed, run out of disk or meet another: the old or the new checkpoint stands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from judge import stored
from typer.testing import CliRunner

from epmq_gptq import cli
from epmq_gptq.checks.engines.packed import PACKED
from epmq_gptq.io.output import check_output

HERE = Path(__file__).parent
NAMES = {"expert0", "expert1"}


class Child:
    """A process with a quantized model in memory, see `saving_child.py`."""

    def __init__(self, models: Path, log: Path):
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}
        self.log = log
        reader, writer = os.pipe()
        self._answers = os.fdopen(reader)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "saving_child.py"), str(models), str(writer)],
            stdin=subprocess.PIPE,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            cwd=log.parent,
            env=environment,
            text=True,
        )
        os.close(writer)
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict:
        line = self._answers.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def ask(self, do: str = "save", **request) -> dict:
        """Let it save, in a fork unless ``do`` says otherwise; how that ended."""
        self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.family(folder, experts=2, model=tiny.llama(layers=1))
    return folder


@pytest.fixture(scope="module")
def child(models, tmp_path_factory) -> Iterator[Child]:
    process = Child(models, tmp_path_factory.mktemp("child") / "log")
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(child, tmp_path_factory) -> dict:
    """The tensors of a save that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert child.ask(out=str(out))["code"] == "saved"
    return stored(out)


def stands(folder: Path, whole: dict) -> bool:
    """Whether a checkpoint is there, with every tensor as it was rounded, and loads."""
    if not (folder / "epmq_report.json").is_file():
        return False
    tensors = stored(folder)
    assert tensors.keys() == whole.keys()
    assert all(tensors[name].equal(whole[name]) for name in whole)
    assert any(name.endswith(PACKED[0]) for name in tensors)
    return True


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# ---- signals -------------------------------------------------------------------------------------

AFTER = "after the two renames"
MOMENTS = [
    *("a shard is written", "it is verified", "it is flushed", "just before the two renames"),
    *("between the two renames", AFTER),
]


@pytest.mark.fault(
    "F40",
    injected="SIGINT or SIGTERM to a process that saves with `overwrite`, at 6 moments from the "
    "first shard to the removal of the former folder",
    outcome="The former or the new checkpoint stands, whole; nothing else is left.",
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_during_a_save(child, whole, tmp_path, moment, signum):
    out = tmp_path / "out"
    out.mkdir()
    (out / "former").touch()
    ended = child.ask(out=str(out), overwrite=True, moment=moment, signum=int(signum))
    assert ended["status"] == 128 + signum, (ended, child.log.read_text()[-2000:])
    assert hidden(tmp_path) == []
    if moment == AFTER:
        assert stands(out, whole)
    else:
        assert [path.name for path in out.iterdir()] == ["former"]


@pytest.mark.fault(
    "F39",
    injected="SIGKILL to a process that saves with `overwrite`, at 6 moments from the first shard "
    "to the removal of the former folder",
    outcome="The former or the new checkpoint stands, whole. What lies hidden beside it goes with "
    "the next save; between two renames the former one lies there, and is put back "
    "(`EPMQ-S02`).",
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_a_save(child, whole, tmp_path, moment):
    out = tmp_path / "out"
    out.mkdir()
    (out / "former").touch()
    ended = child.ask(out=str(out), overwrite=True, moment=moment, signum=int(signal.SIGKILL))
    assert ended["status"] == -signal.SIGKILL, ended
    assert set(hidden(tmp_path)) <= {".out.partial", ".out.partial.lock", ".out.former"}
    if moment == "between the two renames":
        assert not out.exists()
        with pytest.warns(match="that one was put back"):
            check_output(out, {}, True)
        assert [path.name for path in out.iterdir()] == ["former"]
    if moment == AFTER:
        assert stands(out, whole)
    else:
        assert [path.name for path in out.iterdir()] == ["former"]
    # The next save clears up and works.
    assert child.ask(out=str(out), overwrite=True)["code"] == "saved"
    assert stands(out, whole) and hidden(tmp_path) == []


def test_a_checkpoint_that_survived_loads(child, tmp_path):
    child.ask(out=str(tmp_path / "out"))
    child.ask(out=str(tmp_path / "out"), overwrite=True, moment=AFTER, signum=9)
    loaded = tiny.reload(tmp_path / "out")
    assert loaded.model.model.layers[0].mlp.up_proj.qweight.shape == (8, 128)


test_a_checkpoint_that_survived_loads = pytest.mark.fault(
    "F39",
    injected="SIGKILL just after the new folder took its name",
    outcome="The new checkpoint loads in GPTQModel.",
)(test_a_checkpoint_that_survived_loads)


@pytest.mark.fault(
    "F39",
    injected="SIGKILL to `epmq-gptq quantize` while the merge that it made lies beside the output",
    outcome="The output is not there; the merge goes with the next run that names the output.",
)
def test_a_kill_after_a_temporary_merge(models, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one row of some words"}\n' * 4)
    experts = {name: str(models / name) for name in sorted(NAMES)}
    recipe = {"merge": {"method": "average"}, "experts": experts, "quantize": {"group_size": 32}}
    recipe["calibration"] = dict.fromkeys(experts, "rows.jsonl")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    script = (
        "import os, signal, sys\n"
        "from epmq_gptq import cli\n"
        "from epmq_gptq.host import loading\n"
        "loading.load_merged = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.argv = ['epmq-gptq', 'quantize', 'recipe.json', '--out', 'out']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / ".out.merge" / "merged" / "model.safetensors").is_file()
    assert check_output(tmp_path / "out", {}, False) == tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.json", "rows.jsonl"}


@pytest.mark.fault(
    "F43",
    injected="A second process saves to the folder that a first one is saving to",
    outcome='The second is refused (`EPMQ-F45`, "another process is writing"); the first finishes.',
)
def test_two_writers(child, whole, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "first is at work"
    first = child.ask(out=str(out), wait=str(flag))
    while not flag.exists():
        time.sleep(0.01)
    second = child.ask(out=str(out), overwrite=True)
    assert second["code"] == "EPMQ-F45" and "another process is writing to `out`" in second["cause"]
    flag.unlink()
    assert child.ask("wait for", child=first["child"])["status"] == 0
    assert stands(out, whole) and hidden(tmp_path) == []


# ---- disks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system of its own at ``place``; the test is skipped where none may be mounted."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)]
    done = (
        subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    )
    if done is None or done.returncode:
        pytest.skip(f"no file system may be mounted here: {done and done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.fault(
    "F44",
    injected="`save` to a file system (tmpfs) of 1 MB",
    outcome="Refused with both numbers before anything is written; `save` elsewhere works.",
)
def test_a_disk_that_is_too_small(child, whole, tmp_path):
    with mounted(tmp_path / "disk", "size=1m"):
        refused = child.ask("save here", out=str(tmp_path / "disk" / "out"))
        assert refused["code"] == "EPMQ-F44"
        free = os.statvfs(tmp_path / "disk").f_bavail * os.statvfs(tmp_path / "disk").f_frsize
        assert f"bytes free, got {free:,}." in refused["cause"]
        assert list((tmp_path / "disk").iterdir()) == []
    assert child.ask("save here", out=str(tmp_path / "out"))["code"] == "saved"
    assert stands(tmp_path / "out", whole)


@pytest.mark.fault(
    "F44",
    injected="`epmq-gptq quantize` with the temporary folder, and then the output, on a file "
    "system (tmpfs) of 16 kB",
    outcome="Refused before a model is loaded, with both numbers and what needs them.",
)
@pytest.mark.parametrize("small", ["temporary folder", "output"])
def test_a_run_that_would_not_fit(models, tmp_path, monkeypatch, small):
    (tmp_path / "rows.jsonl").write_text('{"text": "one row of some words"}\n' * 4)
    recipe = {"merged": str(models / "merged"), "experts": {"a": str(models / "expert0")}}
    recipe |= {"calibration": {"a": "rows.jsonl"}, "quantize": {"group_size": 32}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    disk = tmp_path / "disk"
    with mounted(disk, "size=16k"):
        if small == "output":
            out = disk / "out"
        else:
            out = tmp_path / "out"
            monkeypatch.setattr(tempfile, "tempdir", str(disk))
        done = CliRunner().invoke(
            cli.app, ["quantize", str(tmp_path / "recipe.json"), "--out", str(out)]
        )
    wanted = {"temporary folder": "for finished layers", "output": "for the checkpoint"}[small]
    assert done.exit_code == 2 and "[EPMQ-F44]" in done.stderr, done.output
    assert "bytes free, got 16,384" in done.stderr and f"{wanted})" in done.stderr
    assert not out.exists()


@pytest.mark.fault(
    "F44",
    injected="A file system (tmpfs) that somebody else fills just after the check, so that writing "
    "the shards runs into its end",
    outcome="`EPMQ-F44`; what was begun is removed, a former checkpoint stands, and the same "
    "process saves elsewhere.",
)
def test_a_disk_that_runs_full(child, whole, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=8m"):
        assert child.ask(out=str(disk / "out"))["code"] == "saved"
        failed = child.ask(out=str(disk / "out"), overwrite=True, fill=str(disk))
        assert failed["code"] == "EPMQ-F44" and "ran full" in failed["cause"], failed
        assert stands(disk / "out", whole) and hidden(disk) == []
        (disk / "others").unlink()
        assert child.ask(out=str(disk / "out"), overwrite=True)["code"] == "saved"
        assert stands(disk / "out", whole)


@pytest.mark.fault(
    "F44",
    injected="A limit of file sizes (RLIMIT_FSIZE) of 40 kB in the process that saves",
    outcome="`EPMQ-F44`, told apart from a full disk; nothing is left.",
)
def test_a_limit_of_file_sizes(child, tmp_path):
    failed = child.ask(out=str(tmp_path / "out"), limit=40_000)
    assert failed["code"] == "EPMQ-F44" and "grow that large" in failed["cause"], failed
    assert list(tmp_path.iterdir()) == []


# ---- places and order ----------------------------------------------------------------------------


@pytest.mark.fault(
    "F45",
    injected="An output that is, contains or lies inside the merged model or an expert, also by a "
    "symbolic link",
    outcome="Refused; no file of a source changes.",
)
def test_places_that_would_destroy_a_source(child, models, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    os.symlink(models, tmp_path / "link")
    for place in (
        *("merged", "merged/in/it", "expert0", "expert1/out", "."),
        tmp_path / "link" / "merged",
    ):
        refused = child.ask("save here", out=str(models / place), overwrite=True)
        assert refused["code"] == "EPMQ-F45" and "lie outside of every input" in refused["cause"]
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


@pytest.mark.fault(
    "F45",
    injected="A file system that is mounted read-only",
    outcome="Refused before anything is computed or written, with the system's reason.",
)
def test_a_read_only_disk(child, tmp_path):
    with mounted(tmp_path / "disk", "size=8m", "ro"):
        refused = child.ask("save here", out=str(tmp_path / "disk" / "out"))
        assert refused["code"] == "EPMQ-F45" and "Read-only file system" in refused["cause"]


@pytest.mark.fault(
    "F45",
    injected="A folder that another user may not write to, and a file in the place of a folder",
    outcome="Refused, with the system's reason.",
)
def test_a_folder_of_somebody_else(tmp_path):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from epmq_gptq.io.output import check_output\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "try: check_output(Path(sys.argv[1]), {}, False)\n"
        "except Exception as error: print(error.code, error)"
    )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    opened = [place for place in (tmp_path, *tmp_path.parents) if not place.stat().st_mode & 0o001]
    for place in opened:  # pytest's folders are the user's own
        place.chmod(0o755)
    (tmp_path / "file").touch()
    for place, says in ((closed / "out", "Permission denied"), (tmp_path / "file", "got the file")):
        command = [sys.executable, "-c", script, str(place)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
        assert "EPMQ-F45" in done.stdout and says in done.stdout, done


@pytest.mark.fault(
    "F52",
    injected="`save` before `quantize`, and `quantize` a second time",
    outcome="Refused; the folder is not made, and the quantized model can still be saved.",
)
def test_calls_in_the_wrong_order(models, tmp_path):
    from epmq_gptq import EPMQConfig, EPMQInputError

    experts = {name: models / name for name in sorted(NAMES)}
    rows = {name: tiny.rows(3, 40, seed=1) for name in experts}
    model = tiny.load(models / "merged", EPMQConfig(group_size=32, experts=experts))
    with pytest.raises(EPMQInputError, match="`save` came before `quantize`") as early:
        model.save(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    model.quantize(rows)
    with pytest.raises(EPMQInputError, match="quantized already") as twice:
        model.quantize(rows)
    assert early.value.code == twice.value.code == "EPMQ-F52"
    model.save(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
