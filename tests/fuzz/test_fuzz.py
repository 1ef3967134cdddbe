"""Whatever is in a stranger's file: a value or an error of ours, nothing read outside, no blow-up.

`make test` tries some mutations of every file, the same in every run; `make fuzz` goes on for
minutes. What it finds is kept in ``corpus/found`` and read in every run from then on.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from targets import ALONE, CORPUS, TARGETS, Target

from epmq_gptq import EPMQError
from epmq_gptq.experts import adapters
from epmq_gptq.host.recorded import bundle
from epmq_gptq.io import checkpoints

# Examples of each file; `make fuzz` sets more, of other seeds.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
# What an import or the interpreter opens by itself.
OURS = [
    Path(path).resolve() for path in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"))
]
OURS += [Path(checkpoints.__file__).resolve().parent, Path("/proc"), Path("/sys"), Path("/dev")]
OURS += [Path("/usr/share/zoneinfo"), Path("/etc/localtime")]
# Libraries ask what is installed, and an editable package's answer lies beside it.
OURS += Path(checkpoints.__file__).resolve().parents[1].glob("*.egg-info")
SECONDS, MEGABYTES = 60, 500

_opened: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)  # for good: there is no way to take one off


@pytest.fixture(autouse=True)
def native_opens_are_seen(monkeypatch):
    """safetensors opens files by itself, where no hook of Python's sees it."""
    for module in (checkpoints, adapters, bundle):
        if hasattr(module, "safe_open"):
            real = module.safe_open

            def watched(file, *arguments, real=real, **options):
                _watch("open", (os.fspath(file),))
                return real(file, *arguments, **options)

            monkeypatch.setattr(module, "safe_open", watched)


def laid_out(target: Target, content: bytes, folder: Path) -> Path:
    """The folder of a target with one file replaced, and canaries outside of it."""
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    if target.folder in ALONE:
        place.mkdir(parents=True)
    else:
        shutil.copytree(CORPUS / target.folder, place)
    (place / target.file).write_bytes(content)
    if not (folder / "canary.safetensors").exists():
        save_file({"canary": torch.zeros(1)}, folder / "canary.safetensors")
    return place


def attempt(target: Target, content: bytes, folder: Path):
    """Read it; what was opened lies in the folder, and whatever is raised is ours."""
    global _opened
    place = laid_out(target, content, folder)

    def hangs(*_):
        raise AssertionError(f"{target} does not end")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    gc.disable()  # a temporary folder of an earlier test's model opens it when it is collected
    _opened = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return target.read(place)
    except EPMQError as error:
        assert error.code and error.remedy and "\n" not in str(error)
        return error
    finally:
        opened, _opened = _opened, None
        gc.enable()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for path in opened:
            real = Path(path).resolve()
            assert any(real.is_relative_to(parent) for parent in (place.resolve(), *OURS)), path


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_value_or_an_error_of_ours(target, tmp_path):
    assert not isinstance(attempt(target, target.valid, tmp_path), EPMQError)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck))
    @given(st.data())
    def fuzzed(data):
        attempt(target, data.draw(target.mutate(target.valid)), tmp_path)

    fuzzed()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024, f"{grown} kB more"


def found() -> list[Path]:
    """What was found: files named `TARGET.what-it-is`."""
    return sorted((CORPUS / "found").iterdir())


@pytest.mark.parametrize("file", found(), ids=lambda file: file.name)
def test_what_was_found_once(file, tmp_path):
    (target,) = [one for one in TARGETS if file.name.startswith(f"{one}.")]
    attempt(target, file.read_bytes(), tmp_path)


def test_the_hook_sees_what_is_opened_outside(tmp_path):
    """The judge itself: a reader that follows a path out of the folder is caught."""

    def follows(folder: Path):
        return (folder / "../canary.safetensors").read_bytes()

    def follows_natively(folder: Path):
        return checkpoints.safe_open(folder / "../canary.safetensors", "pt").keys()

    for read in (follows, follows_natively):
        with pytest.raises(AssertionError, match="canary"):
            attempt(TARGETS[0]._replace(read=read), TARGETS[0].valid, tmp_path)


def test_the_hook_blames_no_reader_for_what_an_earlier_test_left(tmp_path):
    """A temporary folder in a cycle is opened, to empty it, whenever the collector runs."""
    left = tempfile.TemporaryDirectory(dir=tmp_path)
    cycle = [left]
    cycle.append(cycle)
    del left, cycle

    def makes_the_collector_run(folder: Path) -> int:
        return len([[] for _ in range(10 * gc.get_threshold()[0])])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        attempt(TARGETS[0]._replace(read=makes_the_collector_run), TARGETS[0].valid, tmp_path)
        gc.collect()
