"""The hub's models as folders that can be merged: safetensors, one naming, the commit recorded."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQInputError, EPMQWarning
from epmq_gptq.io.checkpoints import Checkpoint, resolve_source

from .specs import FAMILIES, Family

# What a CLIP vision folder needs beside its weights so that images and class names can be read.
_COMPANIONS = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_PREFIX = "vision_model."
_CLASSES = {"images": "CLIPVisionModel", "pairs": "T5ForConditionalGeneration"}


@dataclass(frozen=True)
class Models:
    """The checkpoints of one family.

    Attributes:
        base: folder of the model that the experts were fine-tuned from.
        experts: task → folder.
        whole: of CLIP, the folder of the base with its text tower; else ``base``.
        commits: hub id → commit.
    """

    base: Path
    experts: dict[str, Path]
    whole: Path
    commits: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Fetcher:
    """Where models come from and where copies of them go.

    Attributes:
        cache: folder of the copies.
        log: is told what is fetched.
        pins: hub id → branch, tag or commit; others are taken as they are today.
        allow_bin: also take a repository whose only weights are PyTorch's ``.bin``. transformers
            reads them as plain tensors (``weights_only``); nothing else of this project opens them.
        commits: hub id → the commit that was read.
    """

    cache: Path
    log: Callable[[str], None]
    pins: dict[str, str] = field(default_factory=dict)
    allow_bin: bool = False
    commits: dict[str, str | None] = field(default_factory=dict)

    def fetch(self, spec: str) -> Path:
        """The folder of a hub id.

        Raises:
            EPMQInputError: it cannot be had, or has no safetensors and ``allow_bin`` is off.
        """
        self.log(f"fetch {spec}")
        at = f"{spec}@{self.pins[spec]}" if spec in self.pins else spec
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EPMQWarning)  # not pinned: the commit is recorded
                source = resolve_source(at, what=f"`{spec}`")
        except EPMQInputError as error:
            if error.code != "EPMQ-F14":
                raise
            return self._fetch_bin(spec, error)
        self.commits[spec] = source.revision
        return source.path

    def _fetch_bin(self, spec: str, error: EPMQInputError) -> Path:
        if not self.allow_bin:
            raise EPMQInputError(
                error.cause,
                code=error.code,
                subject=error.subject,
                remedy="Pass --allow-bin to have transformers convert it, or --revision "
                f"{spec}=REVISION of one that has safetensors.",
            ) from error
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.model", "pytorch_model*.bin"]
        folder = Path(
            snapshot_download(spec, revision=self.pins.get(spec), allow_patterns=patterns)
        )
        self.commits[spec] = folder.name
        return folder

    def place(self, spec: str, suffix: str) -> Path:
        """Where a copy of a model goes."""
        commit = (self.commits[spec] or "local")[:12]
        return self.cache / "models" / f"{spec.replace('/', '--')}-{commit}{suffix}"


def prepare(name: str, tasks: Iterable[str], fetcher: Fetcher) -> Models:
    """Fetch a family's base and the experts of ``tasks``.

    A checkpoint whose tensors are named otherwise than the others', or that has no safetensors, is
    saved again by transformers.

    Raises:
        EPMQInputError: a model cannot be had.
    """
    family = FAMILIES[name]
    whole = fetcher.fetch(family.base)
    specs = {task: family.expert.format(task=task) for task in tasks}
    folders = {task: fetcher.fetch(spec) for task, spec in specs.items()}
    first = _names(next(iter(folders.values())))
    base = whole
    if family.kind == "images":
        prefix = _PREFIX if first is None or _has_prefix(first) else ""
        place = fetcher.place(family.base, "-vision" if prefix else "-vision-bare")
        base = _once(place, lambda out: _vision_of(whole, out, prefix))
    if any(_names(base) is None or _names(each) != _names(base) for each in folders.values()):
        if family.kind != "images":
            base = _resaved(family.base, whole, None, family, fetcher)
        rows = _vocabulary(base)
        for task, folder in folders.items():
            if _names(folder) != _names(base):
                folders[task] = _resaved(specs[task], folder, rows, family, fetcher)
    return Models(base, folders, whole, dict(fetcher.commits))


def _names(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Tensor → shape; None of a folder without safetensors."""
    if not any(folder.glob("*.safetensors")):
        return None
    checkpoint = Checkpoint(folder, what=f"`{folder.name}`")
    found = {name: checkpoint.info(name).shape for name in checkpoint}
    checkpoint.close()
    return found


def _has_prefix(names: Iterable[str]) -> bool:
    return any(name.startswith(_PREFIX) for name in names)


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is written whole or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(scratch)
            scratch.chmod(0o755)
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _vision_of(whole: Path, out: Path, prefix: str) -> None:
    """The vision tower of a CLIP, named as the experts' checkpoints name it."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(whole, dtype="auto")
    state = clip.vision_model.state_dict()
    tensors = {
        f"{prefix}{name.removeprefix(_PREFIX)}": tensor.contiguous()
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = clip.config.vision_config.to_dict()
    config |= {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    for name in _COMPANIONS:
        if (whole / name).is_file():
            shutil.copyfile(whole / name, out / name)


def _vocabulary(folder: Path) -> int | None:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")


def _resaved(spec: str, folder: Path, rows: int | None, family: Family, fetcher: Fetcher) -> Path:
    import transformers

    model_class = getattr(transformers, _CLASSES.get(family.kind, "AutoModelForCausalLM"))

    def write(out: Path) -> None:
        fetcher.log(f"save again {spec}")
        model = model_class.from_pretrained(folder, dtype="auto")
        if rows is not None and model.config.vocab_size != rows:
            # MergeBench's math expert carries 64 rows of padding tokens that the base lacks.
            model.resize_token_embeddings(rows)
        model.save_pretrained(out)
        for file in folder.iterdir():
            companion = file.suffix in (".json", ".txt", ".model", ".jinja")
            if companion and "index" not in file.name and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
        if family.kind == "images":
            _rename(out)

    suffix = "" if rows is None else f"-{rows}"
    return _once(fetcher.place(spec, f"-resaved{suffix}"), write)


def _rename(folder: Path) -> None:
    """Give a vision tower that transformers 5 saved the prefix that the hub's experts have."""
    checkpoint = Checkpoint(folder, what=f"`{folder.name}`")
    tensors: dict[str, torch.Tensor] = {
        f"{_PREFIX}{name.removeprefix(_PREFIX)}": checkpoint.read(name).clone()
        for name in checkpoint
    }
    checkpoint.close()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
