"""One attempt at a run that can go on: its folder, its signals, and when it commits."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptqmodel.looper.checkpoint import CheckpointExtension, CheckpointStopped
from gptqmodel.looper.checkpoint_store import (
    CheckpointConfig,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointStore,
)
from gptqmodel.looper.extension import LoopBoundary

from ...config import EPMQConfig
from ...errors import EPMQError, EPMQInputError, EPMQStopped, EPMQWarning
from ...io.declared import conflict, is_count
from ...io.families import FAMILIES
from ...io.interrupts import handled
from ...io.output import check_output, ran_full
from ...io.phases import Phases
from .attempts import Attempt, clear_dead
from .identity import BATCH_SIZES, another_run, refuse_another_run

# Of the time of a run, what its checkpoints may take.
SHARE = 0.05

# Which of each family have been killed and gone on in tests/host/test_resume.py, to equal tensors.
PROVEN = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "opt"),
        *("mixtral", "qwen3_moe"),
        *(t for family in FAMILIES if family.is_proven_to_resume for t in family.model_types),
    }
)

# What may lie in the folder of a checkpoint; a folder with anything else is somebody's.
_OURS = ("objects", "CURRENT", "writer.lock", "digests.json")


class Stopped(EPMQStopped, CheckpointStopped):
    """Ours and the host's: a run was asked to stop, and has committed what is done."""


def check_checkpoint(checkpoint: Any, config: EPMQConfig, model_type: str) -> CheckpointConfig:
    """The host's configuration of a checkpoint, if this run can have one.

    Raises:
        EPMQInputError: the option is of another type, its folder is somebody's, or it has not been
            tried with this architecture.
    """
    if not isinstance(checkpoint, CheckpointConfig):
        raise EPMQInputError(
            f"`checkpoint` should be a `gptqmodel.CheckpointConfig`, got {checkpoint!r}.",
            code="EPMQ-O01",
            subject="`checkpoint`",
            remedy='Write `checkpoint=CheckpointConfig("folder")`.',
        )
    if model_type not in PROVEN:
        raise EPMQInputError(
            f"`checkpoint`: going on after a kill has not been tried with `{model_type}` models.",
            code="EPMQ-F38",
            subject="`checkpoint`",
            remedy="Leave it out; the run itself is not affected.",
        )
    if not config.offload_to_disk:
        raise conflict(
            "checkpoint",
            "needs `offload_to_disk=True`: finished layers are committed from there",
            "Leave `offload_to_disk` as it is by default.",
        )
    if not config.true_sequential:
        raise conflict(
            "checkpoint",
            "needs `true_sequential=True`",
            "Leave `true_sequential` as it is by default.",
        )
    if checkpoint.path == "auto" and getattr(config, "_offload_temp_dir", None) is not None:
        raise conflict(
            "checkpoint",
            'with `path="auto"` would be in a temporary folder, which is gone with the process',
            "Give its `path`, or set `offload_to_disk_path`.",
        )
    return replace(checkpoint, path=checkpoint.resolve_path(config.offload_to_disk_path))


def check_root(folder: Path, inputs: Mapping[str, Path], *, option: str = "checkpoint") -> Path:
    """The absolute folder of a checkpoint, if it may be one.

    Raises:
        EPMQInputError: it is, holds or lies in an input, cannot be written, or holds other things.
    """
    root = check_output(folder, inputs, True, option=option, moved_there=False)
    names = {place.name for place in root.iterdir()} if root.is_dir() else set()
    strangers = sorted(
        name
        for name in names
        if name not in _OURS and not name.startswith(("attempt-", ".CURRENT", ".digests"))
    )
    if strangers:
        raise EPMQInputError(
            f"`{option}` should be a new folder or one of an earlier attempt, got `{root.name}`, "
            f"which holds `{strangers[0]}`.",
            code="EPMQ-F45",
            subject=f"`{option}`",
            remedy="Choose another folder.",
        )
    return root


class Store(CheckpointStore):
    """The host's store, which hashes each object once per process.

    The host's hashes all earlier layers about five times per commit. An object never changes under
    its name, so one that this process has written or checked, and whose file is untouched, is good.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._good: dict[str, tuple[int, int, int]] = {}

    def object_path(self, digest: str) -> Path:
        """The file of an object that is what it should be."""
        path = self.root / "objects" / str(digest)
        if not self._is_good(digest, path):
            path = super().object_path(digest)
            self._good[digest] = _state(path)
        return path

    def get(self, digest: str) -> bytes:
        """The bytes of an object that is what it should be."""
        path = self.root / "objects" / str(digest)
        if self._is_good(digest, path):
            return path.read_bytes()
        data = super().get(digest)
        self._good[digest] = _state(path)
        return data

    def _is_good(self, digest: Any, path: Path) -> bool:
        return isinstance(digest, str) and self._good.get(digest, "") == _state(path)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


class Resumable(CheckpointExtension):
    """Commits a run at the ends of its layers.

    A layer is committed when the checkpoint's ``interval`` has passed since the last one, and all
    commits together, the next one included, stay within :data:`SHARE` of the run's time so far.
    The first layer always is, as it shows what a commit costs; so are the last one, and the one
    after which a stop was asked for.

    Args:
        config: with the folder as its path.
        phases: where the time is counted.

    Attributes:
        cost: seconds of all commits.
        commits: how many there were.
    """

    def __init__(self, config: CheckpointConfig, phases: Phases | None = None):
        super().__init__(config, None)
        self.phases = phases or Phases()
        projection = self.store._identity_projection
        self.store = Store(
            config,
            identity_projection=lambda identity: projection(
                {key: value for key, value in identity.items() if key != BATCH_SIZES}
            ),
        )
        self._start = time.perf_counter()
        self.cost = self._last = 0.0
        self.commits = 0

    @property
    def name(self) -> str:
        """Of its folder, for errors."""
        return self.store.root.name

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse, before anything is computed, to go on with another run, or as it must not.

        Raises:
            EPMQInputError: naming what has changed.
        """
        manifest = self._manifest()
        if manifest is None or self.store.config.resume == "never":
            self.store.load(dict(identity))  # says what `resume` does not allow
            return
        before = manifest["identity"].get("epmq")
        if not isinstance(before, Mapping):
            raise another_run(["it is not of E-PMQ"], self.name)
        refuse_another_run(before, identity, self.name)

    def batch_sizes(self, asked: int) -> tuple[int, int]:
        """The size that rows are batched with, and the size that these batches are split to.

        Rows are padded, held out and compared with those of the first attempt as they were
        batched then; an attempt with a smaller size splits these batches.

        Args:
            asked: ``batch_size`` of this attempt.
        """
        manifest = self._manifest()
        if manifest is None or not is_count(asked):
            return asked, asked
        first, last = manifest["identity"].get(BATCH_SIZES, (asked, asked))
        return first, min(last, asked)

    def _manifest(self) -> dict[str, Any] | None:
        """The newest that is whole."""
        for reference in self.store._current() or ():
            try:
                return json.loads(self.store.get(reference))
            except CheckpointCorrupt:
                continue
        return None

    def on_boundary(self, boundary: LoopBoundary) -> None:
        """At the end of a layer: commit it, or leave it for later."""
        done = self.plan.after(boundary.step)
        if not self._is_due(done):
            self.next_step = done
            return
        # Before the clock: what is waited for here would have to be done anyway.
        boundary.quiesce()
        start = time.perf_counter()
        self.adapter.layer = boundary.step.index
        try:
            with self.phases.measure("commit"):
                super().on_boundary(boundary)
        except OSError as error:
            if not ran_full(error):
                raise
            raise EPMQError(
                f"the disk of the checkpoint `{self.name}` ran full; what was committed before is "
                "whole.",
                code="EPMQ-F44",
                subject=f"checkpoint `{self.name}`",
                remedy="Free some space, or copy the folder to a larger disk, and start again with "
                "it.",
            ) from error
        finally:
            self._last = time.perf_counter() - start
            self.cost += self._last
            self.commits += 1

    def _is_due(self, done: int) -> bool:
        if self._stop_requested or done == len(self.plan.steps):
            return True
        if done - self._committed_cursor < self.store.config.interval_layers:
            return False
        elapsed = time.perf_counter() - self._start
        return self.cost + self._last <= SHARE * elapsed or not self.cost


@contextlib.contextmanager
def resumable(
    checkpoint: CheckpointConfig, config: EPMQConfig, phases: Phases | None = None
) -> Iterator[Resumable]:
    """Within: a run that commits and is its folder's only writer.

    What the host moves out of memory goes into an attempt's folder, which after a run that came to
    its end stays for as long as ``config`` does.

    Args:
        checkpoint: from :func:`check_checkpoint`.
        config: of the model.
        phases: where the time is counted.

    Raises:
        EPMQInputError: another process writes there, or what is there cannot be gone on with.
        EPMQStopped: it was asked to stop, and has committed what is done.
    """
    extension = Resumable(checkpoint, phases)
    with _in_words(extension), extension:
        clear_dead(extension.store.root)
        attempt = Attempt(extension.store.root)
        before = config.offload_to_disk_path, getattr(config, "_offload_temp_dir", None)
        config.offload_to_disk_path, config._offload_temp_dir = str(attempt.path), attempt
        try:
            yield extension
        except BaseException:
            config.offload_to_disk_path, config._offload_temp_dir = before
            attempt.cleanup()
            raise
        if before[1] is not None:
            before[1].cleanup()


@contextlib.contextmanager
def stopping_when_told(extension: Resumable) -> Iterator[None]:
    """Within: SIGINT or SIGTERM finish the layer and commit it; a second one does what it always
    does.
    """

    def stop(*_: Any) -> None:
        extension.request_stop()
        handlers.close()
        warnings.warn(
            EPMQWarning(
                "stopping at the end of this layer, which is committed then; once more to stop "
                "at once.",
                code="EPMQ-F40",
            ),
            stacklevel=2,
        )

    with contextlib.ExitStack() as handlers:
        handlers.enter_context(handled(stop, signal.SIGINT, signal.SIGTERM))
        yield


@contextlib.contextmanager
def _in_words(extension: Resumable) -> Iterator[None]:
    """The host's errors about checkpoints as ours."""
    try:
        yield
    except CheckpointStopped as error:
        done, steps = extension.next_step, len(extension.plan.steps)
        raise Stopped(
            f"the run was stopped after {done} of {steps} layers, which are committed in "
            f"`{extension.name}`.",
            code="EPMQ-F40",
            subject=f"checkpoint `{extension.name}`",
            remedy="Start it again with the same checkpoint folder to go on.",
        ) from error
    except CheckpointError as error:
        raise _of_host(error, extension.name) from error


def _of_host(error: CheckpointError, folder: str) -> EPMQInputError:
    text = str(error).rstrip(".")
    if "another writer" in text:
        return EPMQInputError(
            f"another process is writing to the checkpoint `{folder}`.",
            code="EPMQ-F43",
            subject=f"checkpoint `{folder}`",
            remedy="Wait for it, or give this run a folder of its own.",
        )
    if "identity fields: " in text:
        return another_run([f"{text.partition('fields: ')[2]} changed"], folder)
    return EPMQInputError(
        f"the checkpoint `{folder}` cannot be gone on with: {text}.",
        code="EPMQ-F42",
        subject=f"checkpoint `{folder}`",
        remedy="Give a new folder to begin anew.",
    )
