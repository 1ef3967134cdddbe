"""The folder of a checkpoint is data from a stranger: of its files only those in it are read.

No pickle is ever opened, no file is read whose size is absurd, and every way in which a folder can
be unusable has one sentence that says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CARD_NAME = "README.md"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Formats of other programs, as far as people leave them alone in a folder.
OTHER_SUFFIXES = (".gguf", ".h5", ".msgpack", ".onnx")

_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# What a model has beside its weights and `config.json`: patterns of names.
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    *_TOKENIZERS,
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# What a checkpoint needs to be read as a model, and how it was merged; never code, never pickle.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", *_TOKENIZERS, "mergekit_config.yml")
# A folder in it that transformers reads as well.
TEMPLATES = "additional_chat_templates"

# Bytes of a configuration; the largest in use (tokenizer_config.json) have one or two million.
MAX_CONFIG_BYTES = 10_000_000


def list_folder(folder: Path, what: str) -> set[str]:
    """The names of what is in ``folder``.

    Raises:
        EPMQInputError: it is not a folder, or cannot be read.
    """
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError))
        reason = "is not a folder" if missing else f"cannot be read: {reason_of(error)}"
        raise EPMQInputError(
            f"{what}: `{folder.name}` {reason}.",
            code="EPMQ-F15",
            subject=what,
            remedy="Give a folder with safetensors weights that you may read.",
        ) from error


def reason_of(error: Exception) -> str:
    """The first line of an exception, without the path that an OSError would name."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def cache_repository(folder: Path) -> Path | None:
    """The repository in the hub's cache of which ``folder`` is a snapshot, None for any other."""
    folder = folder.resolve()
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_cache else None


def lies_inside(folder: Path, file: Path) -> bool:
    """Whether a checkpoint's file is really in it, wherever links lead.

    A link in a checkpoint must not make us read another file of this disk. The hub's cache links
    into the blob store of the same repository; that counts as inside.
    """
    target, repository = file.resolve(), cache_repository(folder)
    return target.is_relative_to(folder.resolve()) or (
        repository is not None and target.is_relative_to(repository / "blobs")
    )


def check_file(folder: Path, name: str, what: str) -> Path:
    """The file ``name`` of a checkpoint's folder, if it may be read.

    Raises:
        EPMQInputError: it is missing, unreadable, no regular file, or a link that leads nowhere or
            out of the folder.
    """
    file = folder / name
    problem, remedy = "", "Fetch or save the checkpoint again."
    code = "EPMQ-F15"
    try:
        if file.is_file():
            if not lies_inside(folder, file):
                code, problem = "EPMQ-F10", "is a link that escapes the checkpoint"
                remedy = "Put the file itself there; links out of the folder are not followed."
            elif not os.access(file, os.R_OK):
                problem, remedy = "cannot be read", "Give yourself the right to read it."
        elif file.is_symlink():
            problem = "is a link that leads nowhere"
        elif file.exists():
            problem = "is not a regular file"
        else:
            code, problem = "EPMQ-F11", "is missing"
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        problem = f"cannot be read: {reason_of(error)}"
    if problem:
        raise EPMQInputError(
            f"{what}: `{name}` {problem}.", code=code, subject=f"`{name}`", remedy=remedy
        )
    return file


def matching(folder: Path, patterns: Iterable[str], what: str) -> list[str]:
    """The names in ``folder`` that fit one of ``patterns``, without those of folders.

    Unlike ``Path.glob`` this also finds links that lead nowhere.
    """
    names = sorted(list_folder(folder, what))
    fitting = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    return [name for name in fitting if not (folder / name).is_dir()]


def check_links(folder: Path, what: str) -> None:
    """Refuse a folder of which a host would read a file that is not in it.

    Raises:
        EPMQInputError: as :func:`check_file`, for any file that transformers or GPTQModel read.
    """
    names = matching(folder, HUB_PATTERNS, what)
    if (folder / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{name}" for name in matching(folder / TEMPLATES, "*", what)]
    for name in names:
        check_file(folder, name, what)


def read_json(
    folder: Path, name: str, what: str, *, max_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """The JSON object in the file ``name``.

    Raises:
        EPMQInputError: as :func:`check_file`; or it is larger than ``max_bytes``, or not a JSON
            object in UTF-8.
    """
    file = check_file(folder, name, what)
    try:
        size = file.stat().st_size
        if size > max_bytes:
            problem = f"has {size:,} bytes, more than {max_bytes:,}"
        else:
            content = json.loads(file.read_bytes().decode("utf-8"))
            if isinstance(content, dict):
                return content
            problem = f"should be a JSON object, got {type(content).__name__}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: {reason_of(error)}"
    except OSError as error:
        problem = f"cannot be read: {reason_of(error)}"
    except (ValueError, RecursionError) as error:
        problem = f"is not readable as JSON: {reason_of(error)}"
    raise EPMQInputError(
        f"{what}: `{name}` {problem}.",
        code="EPMQ-F13",
        subject=f"`{name}`",
        remedy="Restore the file from where the model came from.",
    )


def adapter_refusal(folder: Path, what: str, *, beside_model: bool) -> EPMQInputError:
    """The error for a PEFT adapter where a whole model is wanted."""
    found = f"{what}: `{folder.name}` holds an adapter (`{ADAPTER_CONFIG}`)"
    if beside_model:
        cause = f"{found} beside a model, so that one of them would be ignored."
        remedy = "Move one of the two to a folder of its own."
    else:
        cause = f"{found}, which is a model only together with its base."
        remedy = (
            "Load it on its base with peft, `merge_and_unload()` it, save that model and give its "
            "folder."
        )
    return EPMQInputError(cause, code="EPMQ-F34", subject=what, remedy=remedy)


def no_weights(folder: Path, names: set[str], what: str) -> EPMQInputError:
    """The error for a folder without safetensors weights, by what it holds instead."""
    pickles = sorted(name for name in names if Path(name).suffix in PICKLE_SUFFIXES)
    others = sorted(name for name in names if Path(name).suffix in OTHER_SUFFIXES)
    cause = f"{what}: no safetensors weights in `{folder.name}`"
    if pickles:
        cause += f"; it holds `{pickles[0]}`, and pickle files are never opened."
        remedy = (
            "Convert it where you trust it: "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    elif others:
        cause += f"; it holds `{others[0]}`, a format that is not read."
        remedy = "Give the safetensors checkpoint that it was made from."
    else:
        cause += "."
        remedy = f"Put `{WEIGHTS_NAME}` or shards with `{INDEX_NAME}` there."
    code = "EPMQ-F14" if pickles or others else "EPMQ-F15"
    return EPMQInputError(cause, code=code, subject=what, remedy=remedy)
