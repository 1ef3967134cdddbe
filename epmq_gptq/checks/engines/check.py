"""A finished GPTQ checkpoint before the engines: who can serve it, and why not."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import EPMQInputError
from ...io.checkpoints import Checkpoint, describe_source, resolve_source
from ...io.folders import list_folder, read_json
from ...io.hub import is_offline, local_folder
from .checkpoint import QUANTIZE_CONFIG, Reading, read_checkpoint
from .parallel import LARGEST
from .rules import judge
from .table import ENGINES, VERSIONS

WHAT = "the checkpoint"
# Of how many layers of a hub's checkpoint zero points are fetched: a few kilobytes each.
REMOTE_LAYERS = 8


@dataclass
class ServingReport:
    """Which engines can serve a checkpoint.

    Attributes:
        name: of the folder, or ``org/name``; never a path.
        revision: the commit of a hub's checkpoint, or None.
        engines: engine → ``version``, ``verdict`` (``"yes"``, ``"limited"``: it loads, but not
            everywhere or not fast, ``"no"``), ``reasons`` (each ``verdict``, ``reason``,
            ``source``) and, where it splits layers over GPUs, ``max_tensor_parallel``.
        found: what is in the checkpoint, by its tensors.
        asked: the engines that were asked for; () for all that are looked after.
        tensor_parallel: GPUs that shall share each layer.
    """

    name: str
    revision: str | None
    engines: dict[str, dict[str, Any]]
    found: dict[str, Any]
    asked: tuple[str, ...] = ()
    tensor_parallel: int = 1
    schema: int = field(default=1, init=False)

    def can(self, engine: str) -> bool:
        """Whether an engine can serve it, if need be with limits."""
        return self.engines[engine]["verdict"] != "no"

    @property
    def is_served(self) -> bool:
        """Whether all engines that were asked for can serve it; without any, whether one can."""
        if self.asked:
            return all(map(self.can, self.asked))
        return any(map(self.can, self.engines))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {"epmq_gptq": __version__, **asdict(self), "is_served": self.is_served}


def check_checkpoint(
    checkpoint: str | Path, *, engines: Iterable[str] = (), tensor_parallel: int = 1
) -> ServingReport:
    """Say which engines can serve a finished GPTQ checkpoint, ours or any other.

    What is judged is what the tensors hold; where a configuration file says something else, an
    engine that reads this file cannot serve it. Nothing is loaded into a model, and no GPU and no
    GPTQModel are needed.

    Args:
        checkpoint: its folder, or ``org/name@revision``, of which only headers, configuration and
            some kilobytes of zero points are fetched.
        engines: names as in ``ENGINES`` in any spelling, or ``"TGI"``; () for all of ``ENGINES``.
        tensor_parallel: GPUs that shall share each layer.

    Raises:
        EPMQInputError: it is no GPTQ checkpoint, its files are damaged or not complete, or an
            option is wrong.
    """
    asked = tuple(engine_named(name) for name in engines)
    if not 1 <= tensor_parallel <= LARGEST:
        raise EPMQInputError(
            f"`tensor_parallel` should be 1 to {LARGEST}, got {tensor_parallel}.",
            code="EPMQ-O01",
            subject="`tensor_parallel`",
            remedy="Give the number of GPUs that shall share each layer.",
        )
    name, revision, reading = _read(str(checkpoint))
    facts = replace(reading.facts, tensor_parallel=tensor_parallel)
    table = judge(facts, dict.fromkeys(asked) or ENGINES)
    return ServingReport(name, revision, table, reading.found, asked, tensor_parallel)


def engine_named(name: str) -> str:
    """The engine in its own spelling.

    Raises:
        EPMQInputError: an engine without rules here.
    """
    for engine in VERSIONS:
        if engine.lower() == name.strip().lower():
            return engine
    raise EPMQInputError(
        f"`engine` should be one of {', '.join(VERSIONS)}, got {name!r}.",
        code="EPMQ-O01",
        subject="`engine`",
        remedy="Leave it out for all that are still looked after.",
    )


def _read(text: str) -> tuple[str, str | None, Reading]:
    folder = local_folder(text, WHAT)
    if folder is None and not is_offline():
        from .remote import RemoteCheckpoint

        remote = RemoteCheckpoint(text, what=WHAT)
        reading = read_checkpoint(remote, remote.json(QUANTIZE_CONFIG), REMOTE_LAYERS)
        return remote.repository, remote.commit, reading
    source = describe_source(folder) if folder else resolve_source(text, what=WHAT)
    quantize_config = None
    if QUANTIZE_CONFIG in list_folder(source.path, WHAT):
        quantize_config = read_json(source.path, QUANTIZE_CONFIG, WHAT)
    with closing(Checkpoint(source.path, what=WHAT)) as local:
        return source.name, source.revision, read_checkpoint(local, quantize_config)
