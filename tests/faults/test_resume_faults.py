"""Kills, signals, full disks and second processes, in a run that can go on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import t5_models
import tiny
import yaml
from jobs import Job, environment
from judge import stored
from resume_runs import assert_same

SEED = int(os.environ.get("EPMQ_KILL_SEED", "8"))


def llama(folder: Path) -> Job:
    merged, experts = tiny.family(folder, experts=2, model=tiny.llama(layers=3))
    rows = {name: tiny.rows(6, 40, seed=index) for index, name in enumerate(experts)}
    return Job(folder, merged, experts, rows, save_statistics=True)


def paper(folder: Path) -> Job:
    merged, experts = tiny.family(folder, experts=3, model=tiny.llama(layers=3))
    rows = {name: tiny.rows(6, 40, seed=index) for index, name in enumerate(experts)}
    return Job(folder, merged, experts, rows, profile="paper", alpha=0.1)


def t5(folder: Path) -> Job:
    merged, experts = t5_models.family(folder)
    rows = {
        name: t5_models.pairs(6, 20, 12, seed=index, spread=6) for index, name in enumerate(experts)
    }
    return Job(folder, merged, experts, rows)


# ---- kills ---------------------------------------------------------------------------------------

# Of each family; the paper's targets need no pass of the experts'.
PHASES = ("forward", "fold", "solve", "round", "pack", "commit", "object", "save", "verify")
OWN_PASS = "expert forward"


@pytest.mark.fault(
    "F39",
    injected="SIGKILL to the process, 29 times at random moments around the beginning of a forward "
    "pass, a fold, a solve, a rounding, the packing, a commit, the copy into the store, the save, "
    "its verification, an expert's own pass; "
    "Llama with the default targets and statistics, Llama with the paper's, T5",
    outcome="each rerun goes on at the last committed layer; in the end every tensor equals that "
    "of an uninterrupted run; what stands under the name of the checkpoint is whole or absent",
)
@pytest.mark.parametrize("family", [llama, paper, t5])
def test_killed_again_and_again(family, tmp_path):
    job = family(tmp_path)
    chance = random.Random(f"{SEED} {family.__name__}")
    phases = [*PHASES, *([] if family is paper else [OWN_PASS])]
    chance.shuffle(phases)
    whole = job.whole()
    kills = finished = 0
    for phase in phases:
        for call in (chance.randint(1, 4), 1):
            done = job.attempt(kill=[phase, call, chance.choice([0.0, 0.0, 0.01, 0.05])])
            if done.returncode == -signal.SIGKILL:
                assert job.told.read_text() == phase
                kills += 1
                break
            # It had less to do than that many calls, and came to its end: from the beginning.
            assert done.returncode == 0, f"{phase} {call}: {done.stderr[-3000:]}"
            assert_same(stored(job.out), whole)
            finished += 1
            shutil.rmtree(job.root)
            shutil.rmtree(job.out)
        if job.out.exists():
            assert_same(stored(job.out), whole)
    assert kills == len(phases), (kills, finished)
    began = (job.root / "CURRENT").exists()
    assert_same(job.finished(), whole)
    assert (int(job.told.read_text()) > 1) == began
    assert list(job.root.glob("attempt-*")) == []


@pytest.mark.fault(
    "F39",
    injected="SIGKILL right after the last layer is committed, before anything is saved",
    outcome="the rerun saves without running a layer again",
)
def test_killed_between_the_last_layer_and_the_save(tmp_path):
    job = llama(tmp_path)
    whole = job.whole()
    assert job.attempt(kill=["save", 1, 0.0]).returncode == -signal.SIGKILL
    assert job.attempt(kill=["forward", 1, 0.0]).returncode == 0  # there is none
    assert_same(stored(job.out), whole)


# ---- the command ---------------------------------------------------------------------------------


class Command:
    """`epmq-gptq quantize RECIPE --out OUT --resume DIR` on a Llama of some layers."""

    def __init__(self, folder: Path, layers: int = 6):
        self.folder = folder
        merged, experts = tiny.family(folder, experts=2, model=tiny.llama(layers=layers))
        rows = [json.dumps({"text": f"{i} and {i * i} make {i + i * i}"}) for i in range(40)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        recipe = {
            "merged": str(merged),
            "experts": {name: str(path) for name, path in experts.items()},
            "calibration": {name: {"file": "rows.jsonl"} for name in experts},
            "quantize": {"bits": 4, "group_size": 32},
            "batch_size": 4,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.root = folder / "unfinished"

    def start(self, out: str = "out", *more: str) -> subprocess.Popen[str]:
        self.before = self.committed()
        words = ["quantize", "recipe.yaml", "--out", out, "--resume", str(self.root), *more]
        return subprocess.Popen(
            [sys.executable, "-m", "epmq_gptq", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=self.folder,
        )

    def run(self, out: str = "out", *more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(out, *more)
        output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def wait_for_layers(self, process: subprocess.Popen[str]) -> None:
        """Until a layer is committed that was not when the process was started."""
        while self.committed() == self.before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def committed(self) -> str:
        pointer = self.root / "CURRENT"
        return pointer.read_text() if pointer.exists() else ""


@pytest.mark.fault(
    "F40",
    injected="SIGTERM, and in another run Ctrl-C (SIGINT), to `epmq-gptq quantize --resume` once "
    "a layer is committed",
    outcome="the layer is finished and committed, exit code 75, one line says how to go on; the "
    "same command goes on, and its tensors equal those of an uninterrupted run",
)
def test_told_to_stop(tmp_path):
    command = Command(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = command.start()
        command.wait_for_layers(process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 75, errors
        assert "Start it again with the same checkpoint folder to go on. [EPMQ-F40]" in errors
        assert not (tmp_path / "out").exists()
        assert list(command.root.glob("attempt-*")) == []
    done = command.run("out", "--json", "run.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run.json").read_text())["report"]
    assert report["attempts"] == 3 and len(report["modules"]) == 6 * 7
    command.root = tmp_path / "another"
    assert command.run("whole").returncode == 0
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "whole"))


@pytest.mark.fault(
    "F40",
    injected="a second Ctrl-C right after the first",
    outcome="the run ends at once with exit code 130, or with 75 if the layer was done before; the "
    "committed layers are whole, and the same command goes on from there",
)
def test_told_twice(tmp_path):
    command = Command(tmp_path)
    process = command.start()
    command.wait_for_layers(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    # The layer may have come to its end before the second one was looked at.
    assert process.returncode in (130, 75), errors
    done = command.run()
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(
    "F40",
    injected="SIGTERM to `epmq-gptq quantize` without `--resume`, while it runs a layer",
    outcome="exit code 143, one line; no checkpoint, no temporary folder is left",
)
def test_ended_by_sigterm(tmp_path):
    Command(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "epmq_gptq", "quantize", "recipe.yaml", "--out", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"TMPDIR": str(scratch)},
        cwd=tmp_path,
    )
    while not list(scratch.glob("gptqmodel_*/model.layers.0.*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert errors == "error: ended by SIGTERM; no checkpoint was written.\n"
    assert list(scratch.iterdir()) == [] and not (tmp_path / "out").exists()


@pytest.mark.fault(
    "F41",
    injected="the recipe, and then the weights of an expert, are changed between two attempts",
    outcome="exit code 2 before anything is computed; the message names the option with both "
    "values, and the expert",
)
def test_changed_between_two_attempts(tmp_path):
    command = Command(tmp_path, layers=3)
    process = command.start()
    command.wait_for_layers(process)
    process.kill()
    process.communicate()
    recipe = tmp_path / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("bits: 4", "bits: 8"))
    done = command.run()
    assert done.returncode == 2 and "`bits` was 4, is 8." in done.stderr, done.stderr
    recipe.write_text(before)
    tiny.family(tmp_path / "other", experts=2, model=tiny.llama(layers=3), size=0.2)
    shutil.copy(tmp_path / "other" / "expert1" / "model.safetensors", tmp_path / "expert1")
    done = command.run()
    assert done.returncode == 2 and "of another run: expert `expert1` changed." in done.stderr
    assert "[EPMQ-F41]" in done.stderr


@pytest.mark.fault(
    "F43",
    injected="a second process is started on the checkpoint of one that runs",
    outcome="the second is refused with exit code 2; the first comes to its end",
)
def test_two_processes_on_one_checkpoint(tmp_path):
    command = Command(tmp_path)
    first = command.start("first")
    command.wait_for_layers(first)
    first.send_signal(signal.SIGSTOP)
    try:
        second = command.run("second")
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2, second.stderr
    assert "another process is writing to the checkpoint `unfinished`" in second.stderr
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors


# ---- full disks ----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(place: Path, size: str, *options: str) -> Iterator[Path]:
    """A file system of that size; the test is skipped where none may be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", place]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.fault(
    "F44",
    injected="finished layers wait in a temporary folder on a file system of 200 kB, which fills "
    "up while a worker of GPTQModel moves a layer there (which would end the process)",
    outcome="error EPMQ-F44 from `quantize` that names the layer and TMPDIR; nothing is left there",
)
def test_the_disk_of_finished_layers_fills_up(tmp_path):
    job = paper(tmp_path)
    with small_disk(tmp_path / "disk", "200k") as disk:
        done = job.attempt(root=None, temporary=str(disk))
        assert done.returncode == 1, done.stderr[-3000:]
        assert "moving it to disk: the disk ran full where a run keeps" in done.stderr
        assert list(disk.iterdir()) == []


@pytest.mark.fault(
    "F44",
    injected="the checkpoint lies on a file system of 700 kB, which fills up at a commit",
    outcome="the run stops and says so; what was committed is whole: copied to a larger disk, it "
    "goes on to the same tensors",
)
def test_the_disk_of_the_checkpoint_fills_up(tmp_path):
    job = paper(tmp_path)
    whole = job.whole()
    with small_disk(tmp_path / "disk", "700k") as disk:
        done = job.attempt(root=str(disk / "unfinished"))
        assert done.returncode == 1, done.stderr[-3000:]
        assert "the disk of the checkpoint `unfinished` ran full" in done.stderr
        shutil.copytree(disk / "unfinished", job.root)
    assert json.loads((job.root / "CURRENT").read_text())["generations"]
    assert_same(job.finished(), whole)
