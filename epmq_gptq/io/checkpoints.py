"""Safetensors checkpoints on disk: found, checked from their headers, read tensor by tensor.

A :class:`Checkpoint` never holds a whole model: :meth:`Checkpoint.read` returns one tensor. It
refuses what could make it read outside its folder, and every pickle format (see ``folders``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import EPMQInputError, EPMQWarning
from .dtypes import DTYPES, FLOATS
from .folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HUB_PATTERNS,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    adapter_refusal,
    cache_repository,
    check_file,
    check_links,
    list_folder,
    no_weights,
    read_json,
    reason_of,
)
from .hub import fetch, fetch_card, listed_files, local_folder, parse_hub_id

# Far above any model in use; what a header may make us hold in memory.
MAX_TENSORS = 1_000_000
# safetensors' own limit for a header; an index lists the same names.
MAX_INDEX_BYTES = 100_000_000
# Files besides `config.json` that a host reads before anything else, and must be able to.
_CONFIGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")

# Keys of a configuration that say what computes attention, or a layer's routed modules.
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


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
        return FLOATS.get(self.dtype)

    @property
    def numel(self) -> int:
        """How many entries the tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes; an unknown dtype counts as one byte an entry."""
        return self.numel * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


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


def resolve_source(spec: str | Path, *, what: str, require_pinned: bool = False) -> Source:
    """Turn a local folder or a hub id ``org/name[@revision]`` into a local folder.

    An existing path wins over a hub id of the same spelling. From a hub only configuration,
    tokenizer and safetensors files are fetched; one without a commit is named in a warning.

    Args:
        spec: the folder or hub id.
        what: how errors call it, for example ``"expert `math`"``.
        require_pinned: refuse a hub id whose revision is not a 40-digit commit.

    Raises:
        EPMQInputError: neither a folder nor a hub id that can be fetched or found in the cache, or
            a repository whose weights are in another format than safetensors.
    """
    text = str(spec)
    local = local_folder(text, what)
    if local is not None:
        return describe_source(local)
    fetched = fetch(text, what=what, patterns=HUB_PATTERNS, require_pinned=require_pinned)
    if not any(fetched.folder.glob("*.safetensors")):
        raise no_weights(Path(fetched.repository), listed_files(fetched), what)
    fetch_card(fetched)
    asked = parse_hub_id(text)
    if not asked.is_pinned:
        warnings.warn(
            EPMQWarning(
                f"{what}: `{text}` is not pinned; today it is `{asked.at(fetched.commit)}`.",
                code="EPMQ-F16",
            ),
            stacklevel=2,
        )
    return Source(text, fetched.repository, fetched.commit, fetched.folder)


def describe_source(path: Path) -> Source:
    """What may be published of a local folder; one of the hub cache knows its id and commit."""
    folder, repository = path.resolve(), cache_repository(path)
    if repository is not None:
        hub_id = repository.name.removeprefix("models--").replace("--", "/")
        return Source(str(path), hub_id, folder.name, folder)
    return Source(str(path), folder.name, None, folder)


def check_folder(path: Path, *, what: str) -> None:
    """Refuse a folder that a host must not be pointed at; reads names, links and headers only.

    A host follows links and an index out of the folder, converts pickle files by itself, and takes
    an adapter's configuration for the name of another model to load.

    Raises:
        EPMQInputError: a file that a host would read is not in the folder, a configuration is not
            a JSON object or names code of a hub, or the weights cannot be opened, see
            :class:`Checkpoint`.
    """
    check_links(path, what)
    checkpoint = Checkpoint(path, what=what)
    checkpoint.close()
    _refuse_kernels(checkpoint.config(), what)
    for name in _CONFIGS:
        if (path / name).is_file():
            read_json(path, name, what)


def _refuse_kernels(config: Any, what: str) -> None:
    """Refuse a configuration for which transformers would fetch a kernel and run it."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_kernels(value, what)
        if _IMPLEMENTATION.fullmatch(key):
            named = value.values() if isinstance(value, dict) else [value]
            kernel = next((one for one in named if isinstance(one, str) and "/" in one), None)
            if kernel is not None:
                raise EPMQInputError(
                    f"{what}: `config.json` has `{key}` {kernel!r}, for which transformers would "
                    "fetch code from the hub and run it.",
                    code="EPMQ-F57",
                    subject="`config.json`",
                    remedy="Remove the key, if you know who wrote the file; no model needs it.",
                )


# (file, bytes, time of change, inode) -> SHA-256. A merge and the quantization after it describe
# the same experts: tens of gigabytes.
known_digests: dict[tuple[Path, int, int, int], str] = {}


class _Stopped(Exception):
    """Hashing was given up."""


def file_digest(file: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, from memory where it has not changed; ``stop`` as in ``digest``."""
    state = file.stat()
    key = file, state.st_size, state.st_mtime_ns, state.st_ino
    if key not in known_digests:
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                if stop is not None and stop.is_set():
                    raise _Stopped
                digest.update(block)
        known_digests[key] = digest.hexdigest()
    return known_digests[key]


@contextlib.contextmanager
def hashing_meanwhile(checkpoints: Iterable[Checkpoint]) -> Iterator[None]:
    """Within: a thread hashes what a :meth:`Checkpoint.digest` will be asked of.

    It reads every byte of every model and keeps one core busy. Whatever goes wrong there is found
    again when a digest is asked for; on an exception the thread ends early.
    """
    stop = threading.Event()

    def work() -> None:
        for checkpoint in checkpoints:
            try:
                checkpoint.digest(stop)
            except _Stopped:
                return
            except OSError:
                continue

    thread = threading.Thread(target=work, name="epmq-digests", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()


class Checkpoint:
    """One safetensors folder, single file or sharded, read lazily.

    Args:
        path: the folder.
        what: how errors call it, for example ``"expert `math`"``.

    Raises:
        EPMQInputError: no safetensors weights, an adapter without its base, a shard missing,
            damaged, or outside the folder, a tensor in two shards, or an index that disagrees with
            the shards.
    """

    def __init__(self, path: str | Path, *, what: str):
        self.path = Path(path)
        self.what = what
        self._handles: dict[str, safe_open] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._index: dict[str, str] | None = None
        self._offsets: dict[str, dict[str, tuple[int, int]]] = {}
        for file in self._shards():
            self._read_header(file)
        self._check_index()

    # ---- headers -----------------------------------------------------------------------------

    def _shards(self) -> list[str]:
        names = list_folder(self.path, self.what)
        shards = sorted(n for n in names if n.endswith(".safetensors") and n != ADAPTER_WEIGHTS)
        if ADAPTER_CONFIG in names or (ADAPTER_WEIGHTS in names and not shards):
            raise adapter_refusal(self.path, self.what, beside_model=bool(shards))
        if INDEX_NAME in names:
            self._index = self._read_index()
            shards = sorted(set(self._index.values()))
            if WEIGHTS_NAME in names and shards != [WEIGHTS_NAME]:
                raise self._mismatch(
                    f"the folder holds `{WEIGHTS_NAME}` and an index of other shards, and programs "
                    "differ in which of the two they read."
                )
        elif WEIGHTS_NAME in names:
            shards = [WEIGHTS_NAME]
        if not shards:
            raise no_weights(self.path, names, self.what)
        for shard in shards:
            self._check_shard_name(shard)
        return shards

    def _read_index(self) -> dict[str, str]:
        content = read_json(self.path, INDEX_NAME, self.what, max_bytes=MAX_INDEX_BYTES)
        weight_map = content.get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise self._mismatch(
                f"`weight_map` of `{INDEX_NAME}` should map tensor names to names of shards."
            )
        return weight_map

    def _mismatch(self, cause: str) -> EPMQInputError:
        return EPMQInputError(
            f"{self.what}: {cause}",
            code="EPMQ-F11",
            subject=f"`{INDEX_NAME}`",
            remedy="Fetch or save the checkpoint again, into an empty folder.",
        )

    def _check_shard_name(self, shard: str) -> None:
        # An index is data from a stranger: a shard may only be a plain file of this folder.
        plain = shard == Path(shard).name and "\\" not in shard and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise EPMQInputError(
                f"{self.what}: shard path `{shard}` escapes the checkpoint.",
                code="EPMQ-F10",
                subject=f"`{INDEX_NAME}`",
                remedy="A shard is a `.safetensors` file of the folder itself; do not use this "
                "checkpoint unless you know who wrote it.",
            )
        check_file(self.path, shard, self.what)

    def _read_header(self, file: str) -> None:
        handle = self._open(file)
        names = handle.keys()
        if len(self._tensors) + len(names) > MAX_TENSORS:
            raise EPMQInputError(
                f"{self.what}: the shards hold more than {MAX_TENSORS:,} tensors.",
                code="EPMQ-F12",
                subject=f"shard `{file}`",
                remedy="That is no model; fetch it again from a place that you trust.",
            )
        for name in names:
            if name in self._tensors:
                first = self._tensors[name].file
                raise self._mismatch(f"tensor `{name}` is in both `{first}` and `{file}`.")
            view = handle.get_slice(name)
            self._tensors[name] = TensorInfo(name, tuple(view.get_shape()), view.get_dtype(), file)

    def _check_index(self) -> None:
        if self._index is None:
            return
        for name, file in self._index.items():
            info = self._tensors.get(name)
            if info is None or info.file != file:
                raise self._mismatch(
                    f"`{INDEX_NAME}` says tensor `{name}` is in `{file}`, which lacks it."
                )
        unmapped = sorted(set(self._tensors) - set(self._index))
        if unmapped:
            raise self._mismatch(f"tensor `{unmapped[0]}` is in a shard but not in `{INDEX_NAME}`.")

    # ---- tensors -----------------------------------------------------------------------------

    def _open(self, file: str) -> safe_open:
        handle = self._handles.get(file)
        if handle is None:
            try:
                handle = safe_open(self.path / file, framework="pt", device="cpu")
            except OSError as error:
                raise EPMQInputError(
                    f"{self.what}: shard `{file}` cannot be read: {reason_of(error)}.",
                    code="EPMQ-F15",
                    subject=f"shard `{file}`",
                    remedy="Give yourself the right to read it, or fetch it again.",
                ) from error
            except SafetensorError as error:
                raise self._damaged(file, error) from error
            self._handles[file] = handle
        return handle

    def _damaged(self, file: str, error: SafetensorError) -> EPMQInputError:
        expected = _expected_size(self.path / file)
        wanted = "" if expected is None else f", {expected:,} expected"
        size = (self.path / file).stat().st_size
        return EPMQInputError(
            f"{self.what}: shard `{file}` ({size:,} bytes{wanted}) is damaged: {reason_of(error)}.",
            code="EPMQ-F12",
            subject=f"shard `{file}`",
            remedy="Fetch it again.",
        )

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
            raise EPMQInputError(
                f"{self.what}: tensor `{name}` is missing.",
                code="EPMQ-F01",
                subject=f"tensor `{name}`",
                remedy="Give a checkpoint that holds it.",
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU."""
        return self._fetch(name, lambda shard: shard.get_tensor(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start:stop`` along the first axis, in the stored dtype; no other is read."""
        assert 0 <= start <= stop <= self.info(name).shape[0], (name, start, stop)
        return self._fetch(name, lambda shard: shard.get_slice(name)[start:stop])

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor into its cache meanwhile, where it knows how to.

        Nothing is waited for, and nothing held: a later :meth:`read` finds the pages there.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        file = self.info(name).file
        place = self._places(file).get(name)
        if place is None:
            return
        descriptor = os.open(self.path / file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, *place, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def _places(self, file: str) -> dict[str, tuple[int, int]]:
        """Tensor → (offset, bytes) in a shard."""
        places = self._offsets.get(file)
        if places is None:
            start, entries = _header(self.path / file) or (0, {})
            places = self._offsets[file] = {
                name: (
                    start + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in entries.items()
            }
        return places

    def _fetch(self, name: str, get: Callable[[safe_open], torch.Tensor]) -> torch.Tensor:
        info = self.info(name)
        try:
            return get(self._open(info.file))
        except SafetensorError as error:
            raise EPMQInputError(
                f"{self.what}: tensor `{name}` ({info.dtype}) cannot be read from `{info.file}`: "
                f"{reason_of(error)}.",
                code="EPMQ-F06",
                subject=f"tensor `{name}`",
                remedy="Convert it to float32, float16 or bfloat16, and leave the file alone "
                "during a run.",
            ) from error

    def config(self) -> dict[str, Any]:
        """``config.json`` as plain data (no code of the checkpoint is run); {} if absent.

        Raises:
            EPMQInputError: it is not a JSON object, or a link out of the folder.
        """
        if "config.json" not in list_folder(self.path, self.what):
            return {}
        return read_json(self.path, "config.json", self.what)

    def digest(self, stop: threading.Event | None = None) -> str:
        """SHA-256 over the shards, in order of their names: what the weights are, bit for bit.

        Args:
            stop: gives up, with an exception, once it is set.
        """
        total = hashlib.sha256()
        for name, file in self.files.items():
            total.update(f"{name}:{file_digest(file, stop)};".encode())
        return total.hexdigest()

    @property
    def files(self) -> dict[str, Path]:
        """Shards by name, in order, and where they are, links followed."""
        names = sorted({info.file for info in self._tensors.values()})
        return {name: (self.path / name).resolve() for name in names}

    def close(self) -> None:
        """Release the memory-mapped shards; a later read maps them again."""
        self._handles.clear()


def open_checkpoint(spec: str | Path, *, what: str) -> tuple[Checkpoint, Source]:
    """:func:`resolve_source`, then :class:`Checkpoint`."""
    source = resolve_source(spec, what=what)
    return Checkpoint(source.path, what=what), source


def _expected_size(file: Path) -> int | None:
    """The bytes that a shard should have by its own header, None where that is not readable."""
    try:
        start, entries = _header(file)
        return start + max(entry["data_offsets"][1] for entry in entries.values())
    # Anything may be in a damaged header.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _header(file: Path) -> tuple[int, dict[str, Any]] | None:
    """Where the tensors of a shard begin, and its entries; None where that is not readable."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_CONFIG_BYTES:
            return None
        header = stream.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
    except (ValueError, AttributeError, RecursionError):
        return None
    return 8 + length, entries
