"""The folder that statistics are kept in: an index, and one safetensors file per shared input."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ...errors import EPMQError, EPMQInputError
from ...io.checkpoints import file_digest
from ...io.folders import check_file, read_json
from .sums import ExpertSums

FOLDER_NAME = "epmq_statistics"
INDEX_NAME = "index.json"
KIND, SCHEMA = "epmq_statistics", 1
# The rows that targets are fitted to, and those that choose alpha.
PARTS = ("fitted", "held_out")


@dataclass
class RecordedLayer:
    """One linear layer.

    Attributes:
        outputs: its number.
        eta, rho: shares of the experts' own inputs and streams in D; 0 where the layer has none.
        lacks: part → expert → Σ‖(W_i − W_m) x‖², where that is known.
        bad: why nothing can be said of it, "" where something can.
    """

    outputs: int
    eta: float = 0.0
    rho: float = 0.0
    lacks: dict[str, dict[str, float | None]] = field(default_factory=dict)
    bad: str = ""


@dataclass
class RecordedGroup:
    """The linear layers of one input.

    Attributes:
        file: where the sums are; "" where there are none.
        sha256: of that file.
        columns: width of the input.
        layers: full name → layer, in the order in which they are quantized.
        tokens: part → expert → calibration tokens.
    """

    file: str
    sha256: str
    columns: int
    layers: dict[str, RecordedLayer]
    tokens: dict[str, dict[str, int]]


class Recorder:
    """Writes a bundle while a run goes on, into a temporary folder of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="epmq-statistics-")
        self.groups: list[RecordedGroup] = []

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._folder.name)

    def add(
        self,
        columns: int,
        layers: dict[str, RecordedLayer],
        parts: Mapping[str, Mapping[str, ExpertSums]],
    ) -> None:
        """Write the sums of one input.

        Args:
            columns: its width.
            layers: those that read it; their ``lacks`` are filled in here.
            parts: part → expert → sums.
        """
        tensors, tokens = {}, {}
        for part, experts in parts.items():
            for expert, sums in experts.items():
                tokens.setdefault(part, {})[expert] = sums.tokens
                for name, layer in sums.layers.items():
                    layers[name].lacks.setdefault(part, {})[expert] = layer.lack
                prefix = f"{part}/{expert}/"
                tensors |= {prefix + name: tensor for name, tensor in sums.tensors().items()}
        file = digest = ""
        if tensors:
            # A name of strangers' modules is no file name on every system; the index knows it.
            file = f"{len(self.groups):05d}.safetensors"
            save_file({k: v.contiguous() for k, v in tensors.items()}, self.path / file)
            digest = file_digest(self.path / file)
        self.groups.append(RecordedGroup(file, digest, columns, layers, tokens))

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the index: the bundle is complete.

        Args:
            about: what it says beside the groups, as plain data without anything private.
        """
        index = {"kind": KIND, "schema": SCHEMA, **about}
        index["groups"] = self.state()
        text = json.dumps(index, indent=1) + "\n"
        (self.path / INDEX_NAME).write_text(text, encoding="utf-8")

    def files(self) -> list[Path]:
        """The files of sums so far."""
        return [self.path / group.file for group in self.groups if group.file]

    def state(self) -> list[dict[str, Any]]:
        """What is known of the groups so far, as plain data."""
        return [asdict(group) for group in self.groups]

    def resume(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from :meth:`state`; the files are put into the folder by the caller."""
        self.groups = [_group(entry) for entry in state]

    def copy_to(self, folder: Path) -> None:
        """Put the bundle into a new folder, for a checkpoint that is being saved."""
        folder.mkdir()
        for file in sorted(self.path.iterdir()):
            shutil.copyfile(file, folder / file.name)

    def close(self) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()


class Bundle:
    """A bundle that was written, opened: its index is read and checked, its files on demand.

    Args:
        folder: the bundle, or a checkpoint that holds one.

    Raises:
        EPMQInputError: there is none, or its index is not one of this version.
    """

    def __init__(self, folder: Path):
        self.what = "the statistics"
        if not (folder / INDEX_NAME).is_file() and (folder / FOLDER_NAME).is_dir():
            folder = folder / FOLDER_NAME
        if not (folder / INDEX_NAME).is_file():
            raise EPMQInputError(
                f"`{folder.name}` holds no statistics: neither `{INDEX_NAME}` nor a folder "
                f"`{FOLDER_NAME}` with one.",
                code="EPMQ-F15",
                subject=self.what,
                remedy="Give a checkpoint that was made with `save_statistics: true`.",
            )
        self.folder = folder
        self.index = read_json(folder, INDEX_NAME, self.what)
        if self.index.get("kind") != KIND or self.index.get("schema") != SCHEMA:
            raise self._damaged(
                f"`{INDEX_NAME}` should be of kind `{KIND}` and schema {SCHEMA}, got "
                f"{self.index.get('kind')!r} and {self.index.get('schema')!r}"
            )
        try:
            self.groups = [_group(entry) for entry in self.index["groups"]]
            self.experts: dict[str, dict[str, Any]] = {
                expert["name"]: expert for expert in self.index["experts"]
            }
            self.options: dict[str, Any] = dict(self.index["options"])
            self.tokens: dict[str, int] = dict(self.index["tokens"])
            self.merged: dict[str, Any] = dict(self.index["merged"])
            if not self.experts or not set(self.experts) <= set(self.tokens):
                raise ValueError("experts without tokens")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"`{INDEX_NAME}` is not complete ({error})") from error
        self.layers = {name: group for group in self.groups for name in group.layers}

    @property
    def held_out(self) -> bool:
        """Whether some rows were kept apart, so that alpha can be chosen again."""
        return any(group.tokens.get("held_out") for group in self.groups)

    def verify(self) -> None:
        """Read every file once.

        Raises:
            EPMQInputError: one is not what the index says.
        """
        for group in self.groups:
            self.sums(group, list(self.experts))

    def sums(
        self, group: RecordedGroup, experts: Sequence[str]
    ) -> dict[str, dict[str, ExpertSums]]:
        """Part → expert → sums of one input, of some experts.

        Raises:
            EPMQInputError: the file is not what the index says.
        """
        if not group.file:
            return {}
        path = check_file(self.folder, group.file, self.what)
        if file_digest(path.resolve()) != group.sha256:
            raise self._damaged(f"`{group.file}` has another SHA-256 than the index says")
        found: dict[str, dict[str, ExpertSums]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                for part, tokens in group.tokens.items():
                    for expert in (name for name in experts if name in tokens):
                        prefix = f"{part}/{expert}/"
                        tensors = {
                            name.removeprefix(prefix): file.get_tensor(name)
                            for name in names
                            if name.startswith(prefix)
                        }
                        lacks = {
                            name: layer.lacks.get(part, {}).get(expert)
                            for name, layer in group.layers.items()
                        }
                        sums = ExpertSums.from_tensors(tokens[expert], tensors, lacks)
                        self._check(group, sums)
                        found.setdefault(part, {})[expert] = sums
        except EPMQError:
            raise
        except Exception as error:  # safetensors has errors of its own
            raise self._damaged(f"`{group.file}` cannot be read ({error})") from error
        return found

    def _check(self, group: RecordedGroup, sums: ExpertSums) -> None:
        d = group.columns
        shapes = [(sums.gram.norms, (d,)), (sums.gram.cosines, (d * (d - 1) // 2,))]
        for name, layer in sums.layers.items():
            if layer.delta is not None:
                shapes.append((layer.delta.values, (group.layers[name].outputs, d)))
        for tensor, shape in shapes:
            if tuple(tensor.shape) != shape:
                raise self._damaged(
                    f"`{group.file}` holds a tensor of shape {tuple(tensor.shape)} where "
                    f"{shape} belongs"
                )
            if not bool(tensor.isfinite().all()):
                raise self._damaged(f"`{group.file}` holds a number that is not finite")

    def _damaged(self, cause: str) -> EPMQInputError:
        return EPMQInputError(
            f"{self.what}: {cause}.",
            code="EPMQ-F12",
            subject=self.what,
            remedy="Copy them again, or make them again by a run with `save_statistics: true`.",
        )


def _group(entry: Mapping[str, Any]) -> RecordedGroup:
    layers = {name: RecordedLayer(**layer) for name, layer in entry["layers"].items()}
    return RecordedGroup(**{**entry, "layers": layers})
