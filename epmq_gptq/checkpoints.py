"""Safetensors checkpoints on disk: found, checked from their headers, read tensor by tensor.

A :class:`Checkpoint` never holds a whole model: :meth:`Checkpoint.read` returns one tensor. It
refuses what could make it read outside its folder, and every pickle format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import EPMQInputError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What a checkpoint needs to be read as a model; never code, never pickle.
HUB_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' own code: "F32", "BF16", ...
    file: str  # name of the shard that holds it

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The floating dtype, or None for anything that is not a floating weight."""
        return _DTYPES.get(self.dtype)

    @property
    def numel(self) -> int:
        """How many entries the tensor has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from, in words that may be published.

    Attributes:
        spec: what the user wrote (a path or ``org/name@revision``).
        name: the hub id, or the last part of a local path; never an absolute path.
        revision: the commit that a hub id resolved to, or None for a local folder.
        path: the local folder that holds the files.
    """

    spec: str
    name: str
    revision: str | None
    path: Path


def resolve_source(spec: str | Path, *, what: str) -> Source:
    """Turn a local folder or a hub id ``org/name[@revision]`` into a local folder.

    An existing path wins over a hub id of the same spelling. From a hub only configuration,
    tokenizer and safetensors files are fetched.

    Args:
        spec: the folder or hub id.
        what: how errors call it, for example ``"expert `math`"``.

    Raises:
        EPMQInputError: neither a folder nor a hub id that can be fetched or found in the cache.
    """
    text = str(spec)
    path = Path(text).expanduser()
    if path.is_dir():
        return describe_source(path)
    if path.exists():
        raise EPMQInputError(f"{what}: `{text}` is a file, not a checkpoint folder.")
    repo, _, revision = text.partition("@")
    if text.startswith(("/", ".", "~")) or repo.count("/") != 1 or "\\" in text:
        raise EPMQInputError(
            f"{what}: `{text}` is neither an existing folder nor a hub id of the form "
            "`org/name@revision`."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(HUB_PATTERNS))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EPMQInputError(
            f"{what}: `{text}` could not be fetched from the hub and is not in its cache: {reason}"
        ) from error
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision or None
    return Source(text, repo, commit, folder)


def describe_source(path: Path) -> Source:
    """What may be published of a local folder; one of the hub cache knows its id and commit."""
    folder = path.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        hub_id = repository.removeprefix("models--").replace("--", "/")
        return Source(str(path), hub_id, folder.name, folder)
    return Source(str(path), folder.name, None, folder)


def lies_inside(folder: Path, file: Path) -> bool:
    """Whether a checkpoint's file is really in it, wherever links lead.

    A checkpoint is data from a stranger: a link in it must not make us read another file of this
    disk. The hub's cache links into the blob store of the same repository; that counts as inside.
    """
    folder, target = folder.resolve(), file.resolve()
    in_cache = folder.parent.name == "snapshots"
    return target.parent == folder or (
        in_cache and target.is_relative_to(folder.parent.parent / "blobs")
    )


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, changed_ns: int, inode: int) -> str:
    # A merge and the quantization after it describe the same experts: tens of gigabytes.
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Checkpoint:
    """One safetensors folder, single file or sharded, read lazily.

    Args:
        path: the folder.
        what: how errors call it, for example ``"expert `math`"``.

    Raises:
        EPMQInputError: no safetensors weights, a shard missing, damaged, or outside the folder, a
            tensor in two shards, or an index that disagrees with the shards.
    """

    def __init__(self, path: str | Path, *, what: str):
        self.path = Path(path)
        self.what = what
        if not self.path.is_dir():
            raise EPMQInputError(f"{what}: `{path}` is not a folder.")
        self._handles: dict[str, safe_open] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for file in self._shards():
            self._read_header(file)
        self._check_index()

    # ---- headers -----------------------------------------------------------------------------

    def _shards(self) -> list[str]:
        index = self.path / INDEX_NAME
        self._index: dict[str, str] | None = None
        if index.is_file():
            try:
                self._index = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise EPMQInputError(
                    f"{self.what}: `{INDEX_NAME}` is not readable: {error}."
                ) from error
            shards = sorted(set(self._index.values()))
        elif (self.path / WEIGHTS_NAME).is_file():
            shards = [WEIGHTS_NAME]
        else:
            shards = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not shards:
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLE_SUFFIXES)
            hint = (
                f"it holds `{pickles[0]}`; pickle files are never opened, convert it first "
                "(`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`)."
                if pickles
                else f"put `{WEIGHTS_NAME}` or shards with `{INDEX_NAME}` there."
            )
            raise EPMQInputError(
                f"{self.what}: no safetensors weights in `{self.path.name}`; {hint}"
            )
        for shard in shards:
            self._check_shard_name(shard)
        return shards

    def _check_shard_name(self, shard: str) -> None:
        # An index is data from a stranger: a shard may only be a plain file of this folder.
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise EPMQInputError(f"{self.what}: shard path `{shard}` escapes the checkpoint.")
        file = self.path / shard
        if not file.is_file():
            raise EPMQInputError(f"{self.what}: shard `{shard}` is missing.")
        if not lies_inside(self.path, file):
            raise EPMQInputError(f"{self.what}: shard path `{shard}` escapes the checkpoint.")

    def _read_header(self, file: str) -> None:
        handle = self._open(file)
        for name in handle.keys():
            if name in self._tensors:
                first = self._tensors[name].file
                raise EPMQInputError(
                    f"{self.what}: tensor `{name}` is in both `{first}` and `{file}`."
                )
            view = handle.get_slice(name)
            self._tensors[name] = TensorInfo(name, tuple(view.get_shape()), view.get_dtype(), file)

    def _check_index(self) -> None:
        if self._index is None:
            return
        for name, file in self._index.items():
            info = self._tensors.get(name)
            if info is None or info.file != file:
                raise EPMQInputError(
                    f"{self.what}: `{INDEX_NAME}` says tensor `{name}` is in `{file}`, which lacks "
                    "it."
                )
        unmapped = sorted(set(self._tensors) - set(self._index))
        if unmapped:
            raise EPMQInputError(
                f"{self.what}: tensor `{unmapped[0]}` is in a shard but not in `{INDEX_NAME}`."
            )

    # ---- tensors -----------------------------------------------------------------------------

    def _open(self, file: str) -> safe_open:
        handle = self._handles.get(file)
        if handle is None:
            try:
                handle = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                size = (self.path / file).stat().st_size
                raise EPMQInputError(
                    f"{self.what}: shard `{file}` ({size} bytes) is damaged: {error}. Fetch it "
                    "again."
                ) from error
            self._handles[file] = handle
        return handle

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Header entry of ``name``; EPMQInputError if the checkpoint lacks it."""
        try:
            return self._tensors[name]
        except KeyError:
            raise EPMQInputError(f"{self.what}: tensor `{name}` is missing.") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU."""
        return self._open(self.info(name).file).get_tensor(name)

    def config(self) -> dict:
        """``config.json`` as plain data (no code of the checkpoint is run); {} if absent."""
        file = self.path / "config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def digest(self) -> str:
        """SHA-256 over the shards, in order of their names: what the weights are, bit for bit."""
        total = hashlib.sha256()
        for file in sorted({info.file for info in self._tensors.values()}):
            real = (self.path / file).resolve()
            state = real.stat()
            shard = _file_digest(real, state.st_size, state.st_mtime_ns, state.st_ino)
            total.update(f"{file}:{shard};".encode())
        return total.hexdigest()

    def close(self) -> None:
        """Release the memory-mapped shards; a later read maps them again."""
        self._handles.clear()


def open_checkpoint(spec: str | Path, *, what: str) -> tuple[Checkpoint, Source]:
    """:func:`resolve_source`, then :class:`Checkpoint`."""
    source = resolve_source(spec, what=what)
    return Checkpoint(source.path, what=what), source
