"""An output never touches an input, is refused while nothing is lost, and is whole or absent."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from pathlib import Path

import pytest

from epmq_gptq.errors import EPMQError, EPMQInputError, EPMQWarning
from epmq_gptq.io import output
from epmq_gptq.io.output import check_output, check_space, check_writable, new_folder, settle


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder of two models; the working folder is beside it."""
    for name in ("base", "math"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "math" / "model.safetensors").write_text("weights")
    return tmp_path / "models"


def refused(out: Path, inputs: dict[str, Path], match: str, **options) -> None:
    with pytest.raises(EPMQInputError, match=match) as caught:
        check_output(out, inputs, True, **options)
    error = caught.value
    assert error.code == "EPMQ-F45" and error.subject == f"`{options.get('option', 'out')}`"
    assert error.remedy.endswith(".")


@pytest.mark.parametrize(
    "where",
    [
        "math",
        "math/deep/er",
        "",
        "..",
        "math/.",
        "math/../math",
        "base/../math/x",
        "../models/math",
    ],
)
def test_an_output_onto_into_or_above_an_input(models, where):
    inputs = {"base": models / "base", "expert `math`": models / "math"}
    refused(models / where, inputs, "lie outside of every input, got .* folder of the")
    assert (models / "math" / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("where", ["link", "link/x", "link/../math", "upper/math", "upper/x/.."])
def test_an_output_that_reaches_an_input_through_a_link(models, where):
    os.symlink(models / "math", models.parent / "link")
    os.symlink(models, models.parent / "upper")
    inputs = {"expert `math`": models / "math"}
    refused(models.parent / where, inputs, "lie outside of every input")


def test_an_input_that_is_a_link_itself(models):
    os.symlink(models / "math", models.parent / "link")
    inputs = {"expert `math`": models.parent / "link"}
    refused(models / "math" / "out", inputs, "lie outside of every input")


def test_a_file_system_that_does_not_tell_cases_apart(models, monkeypatch):
    def samefile(one, other):
        return str(one).lower() == str(other).lower()

    monkeypatch.setattr(os.path, "samefile", samefile)
    inputs = {"expert `math`": models / "math"}
    for where in ("Math", "MATH/out", "../Models"):
        refused(models / where, inputs, "lie outside of every input")
    check_output(models / "mathematics", inputs, False)


@pytest.mark.parametrize("where", ["", "..", "../..", "../../blobs", "../../x"])
def test_a_snapshot_of_the_hub_cache_stands_for_its_repository(tmp_path, where):
    snapshot = tmp_path / "cache" / "models--org--math" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refused(snapshot / where, {"expert `math`": snapshot}, "lie outside of every input")
    check_output(tmp_path / "cache" / "models--org--other", {"expert `math`": snapshot}, False)


def test_neighbours_of_an_input_are_free(models):
    inputs = {"expert `math`": models / "math"}
    for where in ("math-4bit", "mat", "new/deep"):
        assert check_output(models / where, inputs, False) == (models / where).resolve()
    assert sorted(path.name for path in models.iterdir()) == ["base", "math"]


def test_a_place_where_a_file_system_is_mounted_is_refused(tmp_path, monkeypatch):
    """It cannot be moved aside: the finished checkpoint would be lost after all the work."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    refused(volume, {}, "not be where a file system is mounted, got `volume`. Choose a folder in")
    assert check_output(volume / "out", {}, False) == volume / "out"


def test_the_working_folder_is_not_replaced_under_the_user(tmp_path):
    for place in (Path("."), tmp_path, tmp_path.parent, Path("/")):
        refused(place, {}, "not be the working folder, nor contain it")


def test_what_is_no_folder_and_what_is_taken(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", {}, "`save_dir` should be a folder, got the file", option="save_dir")
    refused(tmp_path / "file" / "out", {}, "`file` takes no new folder: Not a directory")
    refused(tmp_path / "x\0y", {}, "be a folder that can be reached")
    refused(tmp_path / ("x" * 300), {}, "File name too long")
    os.symlink("circle", tmp_path / "circle")
    refused(tmp_path / "circle", {}, "`out` should be a folder that can be")
    with pytest.raises(EPMQInputError, match="be new or empty, got `tmp`.*--overwrite"):
        (tmp_path / "tmp").mkdir()
        (tmp_path / "tmp" / "x").touch()
        check_output(tmp_path / "tmp", {}, False)
    assert check_output(tmp_path / "tmp", {}, True) == tmp_path / "tmp"


def test_a_read_only_place_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    assert check_writable(tmp_path / "new" / "out") is None
    made = []

    def read_only(self, *arguments, **options):
        made.append(self)
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(tmp_path / "new" / "out", {}, f"`{tmp_path.name}` takes no new folder: Read-only")
    assert [path.parent for path in made] == [tmp_path] and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    check_space(tmp_path / "new" / "out", 10)
    with pytest.raises(EPMQInputError, match="11 bytes free, got 10") as caught:
        check_space(tmp_path / "new" / "out", 11)
    assert caught.value.code == "EPMQ-F44"


# ---- whole or absent -----------------------------------------------------------------------------


def test_what_stood_there_is_replaced_only_by_what_is_complete(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target) as partial:
        (partial / "new").write_text("half")
        raise RuntimeError("killed")
    assert [path.name for path in target.iterdir()] == ["old"]
    with new_folder(target) as partial:
        (partial / "new").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_folders_that_were_made_on_the_way_go_as_well(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "runs" / "a" / "b") as partial:
        (partial / "x").touch()
        raise KeyboardInterrupt
    assert list((tmp_path / "runs").iterdir()) == []
    with new_folder(tmp_path / "runs" / "a" / "b") as partial:
        (partial / "x").touch()
    assert (tmp_path / "runs" / "a" / "b" / "x").is_file()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path, monkeypatch, error
):
    target = _holding(tmp_path / "target")
    real = os.replace

    def replace(source, destination):
        if str(source).endswith(".partial"):
            raise error
        real(source, destination)

    monkeypatch.setattr(output.os, "replace", replace)
    with pytest.raises(type(error)), pytest.warns(match="that one was put back"):
        with new_folder(target) as partial:
            (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "target"]


def _holding(folder):
    folder.mkdir()
    (folder / folder.name).touch()
    return folder


def test_what_was_written_meanwhile_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(EPMQInputError, match="was written to `target` during the run") as caught:
        with new_folder(target, overwrite=False) as partial:
            (partial / "mine").touch()
            _holding(target)
    assert caught.value.code == "EPMQ-F45"
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "target"]


# ---- what a process that was killed left ---------------------------------------------------------


def test_a_folder_that_is_being_written_belongs_to_one_writer(tmp_path):
    target = tmp_path / "target"
    with new_folder(target) as partial:
        (partial / "mine").touch()
        with pytest.raises(EPMQInputError, match="another process is writing to `target` now"):
            check_output(target, {}, True)
        with pytest.raises(EPMQInputError, match="another process"), new_folder(target):
            pytest.fail("there are two writers")
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_what_a_killed_process_left_is_cleared_up(tmp_path):
    target, partial, former = (
        tmp_path / n for n in ("target", ".target.partial", ".target.former")
    )
    _holding(partial)
    (tmp_path / ".target.partial.lock").touch()
    _holding(tmp_path / ".target.merge")
    settle(target)
    assert list(tmp_path.iterdir()) == []
    with output.claimed(output.hidden(target, "merge"), target) as merge:
        settle(target)  # not that of a run that goes on
        assert merge.is_dir()
    # Between the two renames: the old folder comes back, and is told of.
    _holding(partial)
    _holding(former)
    with pytest.warns(EPMQWarning, match="`target` was cut off .* was put back") as caught:
        with pytest.raises(EPMQInputError, match="`out` should be new or empty"):
            check_output(target, {}, False)
    assert caught[0].message.code == "EPMQ-S02"
    assert [path.name for path in tmp_path.rglob("*")] == ["target", ".target.former"]
    # While the old one was being removed.
    _holding(former)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with new_folder(target) as partial:
            (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]


def test_leftovers_that_cannot_be_removed_are_an_error_of_ours(tmp_path, monkeypatch):
    _holding(tmp_path / ".target.partial")

    def refuse(folder, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.shutil, "rmtree", refuse)
    with pytest.raises(EPMQInputError, match="cannot be cleared up: Permission denied"):
        check_output(tmp_path / "target", {}, False)


@pytest.mark.parametrize("state", ["partial", "merge", "former"])
def test_links_in_the_place_of_leftovers_are_not_followed(tmp_path, state):
    """In a folder that all may write to, somebody else may have put one there."""
    precious = _holding(tmp_path / "precious")
    link = tmp_path / f".target.{state}"
    link.symlink_to(precious)
    with contextlib.suppress(EPMQInputError), new_folder(tmp_path / "target") as partial:
        (partial / "new").touch()
    with contextlib.suppress(EPMQInputError), output.claimed(link, tmp_path / "target"):
        pass
    assert [path.name for path in precious.iterdir()] == ["precious"]
    if state == "partial":
        with pytest.raises(
            EPMQInputError, match="`.target.partial` is no folder of a run of yours"
        ):
            check_output(tmp_path / "target", {}, True)


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path, monkeypatch):
    _holding(tmp_path / ".target.partial")
    monkeypatch.setattr(output.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(EPMQInputError, match="is no folder of a run of yours"):
        settle(tmp_path / "target")
    assert list((tmp_path / ".target.partial").iterdir()) != []
    with new_folder(tmp_path / "other") as partial:  # of which it is the maker, whoever that is
        (partial / "new").touch()


def test_sigterm_is_an_exception_only_while_something_is_written(tmp_path):
    with pytest.raises(SystemExit) as caught, new_folder(tmp_path / "target") as partial:
        (partial / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert caught.value.code == 143 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class SafetensorError(Exception):
    """safetensors' own is no OSError and has no number."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError(28, "No space left on device", "/somewhere"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_disk_that_runs_full_is_said_to_be_full(tmp_path, error):
    with pytest.raises(EPMQError, match="the disk of `out` ran full") as caught:
        with new_folder(tmp_path / "new" / "out") as partial:
            (partial / "model.safetensors").touch()
            raise error
    assert caught.value.code == "EPMQ-F44" and caught.value.__cause__ is error
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_file_sizes_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(EPMQError, match="lets no file at `out` grow that large") as caught:
        with new_folder(tmp_path / "out"):
            raise OSError(27, "File too large")
    assert caught.value.code == "EPMQ-F44"
