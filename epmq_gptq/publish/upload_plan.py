"""Which files of a checkpoint go to a hub, and what is checked before anything is sent.

An allow-list: what nobody thought of stays at home. No request is made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..checks.validate import validate
from ..errors import EPMQInputError
from ..io.checkpoints import Checkpoint
from ..io.folders import (
    BESIDE,
    CARD_NAME,
    INDEX_NAME,
    TEMPLATES,
    check_file,
    list_folder,
    read_json,
    reason_of,
)
from ..run_report import PAGE_NAME, REPORT_NAME
from .card_facts import WHAT
from .page.retention import FILE_NAME as EVALUATION

_CONFIGS = ("config.json", "quantize_config.json")
_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE)([-_.]?\w+)?(\.(txt|md))?")
_REPORTS = (REPORT_NAME, PAGE_NAME, EVALUATION)
# Lists of tokens: any string may be one, that of a path, too.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json", "vocab.txt")
_TEXT = (".json", ".jinja", ".md", ".txt", ".html", ".py", "")

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b")
# Folders in which people keep models, in running text; a URL has a letter before its slash.
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|tmp|mnt|media|data|var|opt|srv|scratch|private|Volumes"
    r"|workspace|content|kaggle)/[\w.-]|~/[\w.-]|[A-Za-z]:\\\w|file://)"
)
# A value that is a path and nothing else.
_WHOLE_PATH = re.compile(r"/(?:[^/\s]+/)+[^/\s]*")
_REMEDY = "Save the checkpoint again, or correct the file."


class UploadFile(NamedTuple):
    """One file: its name in the repository, where it is, and its bytes."""

    name: str
    path: Path
    size: int


@dataclass
class UploadPlan:
    """What would be uploaded.

    Attributes:
        folder: of the checkpoint.
        files: small ones first, then the shards in order.
        left: names in the folder that stay here.
        notes: what deserves a look.
    """

    folder: Path
    files: list[UploadFile] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)


def plan_upload(
    folder: str | Path, *, with_report: bool = False, with_code: bool = False
) -> UploadPlan:
    """Check a checkpoint and say which of its files a hub gets.

    Args:
        folder: of a GPTQ checkpoint.
        with_report: also the report of the run and the evaluation.
        with_code: also the ``*.py`` files of a model that brings its own code.

    Raises:
        EPMQInputError: a file is missing, damaged, a link out of the folder, inconsistent with
            another, or holds something private.
        EPMQNumericalError: a value is not finite.
    """
    folder = Path(folder).expanduser()
    names = list_folder(folder, WHAT)
    with contextlib.closing(Checkpoint(folder, what=WHAT)) as checkpoint:
        validate(checkpoint)
        shards = sorted({checkpoint.info(name).file for name in checkpoint})
    wanted = [*_CONFIGS, *([INDEX_NAME] if INDEX_NAME in names else [])]
    wanted += sorted(name for name in names if _is_beside(name))
    wanted += _templates(folder)
    wanted += [name for name in _REPORTS if with_report and name in names]
    wanted += _code(folder, names, with_code)
    for name in wanted:
        check_file(folder, name, WHAT)
        check_private(folder, name)
    plan = UploadPlan(folder)
    if CARD_NAME in wanted:
        if _license(folder) == "other" and not any(map(_LEGAL.fullmatch, wanted)):
            plan.notes.append(
                "the licence is `other`, for which the hub asks for its text: put a `LICENSE` into "
                f"`{folder.name}`."
            )
    else:
        plan.notes.append(
            f"there is no `{CARD_NAME}`: `epmq-gptq card {folder.name}` writes a model card."
        )
    for name in (*wanted, *shards):
        plan.files.append(UploadFile(name, folder / name, (folder / name).stat().st_size))
    sent = {file.name for file in plan.files}
    plan.left = sorted(name for name in names if name not in sent and name != TEMPLATES)
    return plan


def _is_beside(name: str) -> bool:
    return (
        any(fnmatchcase(name, p) for p in (*BESIDE, CARD_NAME))
        or _LEGAL.fullmatch(name) is not None
    )


def _templates(folder: Path) -> list[str]:
    if not (folder / TEMPLATES).is_dir():
        return []
    names = sorted(list_folder(folder / TEMPLATES, WHAT))
    return [f"{TEMPLATES}/{name}" for name in names if name.endswith(".jinja")]


def _unfit(cause: str, subject: str, remedy: str = _REMEDY) -> EPMQInputError:
    return EPMQInputError(f"{WHAT}: {cause}.", code="EPMQ-P01", subject=subject, remedy=remedy)


# ---- code --------------------------------------------------------------------------------------


def _code(folder: Path, names: set[str], with_code: bool) -> list[str]:
    """The code that a model brings; whoever loads it must trust it, so it never goes silently."""
    needed = set()
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        auto_map = read_json(folder, name, WHAT).get("auto_map") if name in names else None
        for entry in _strings(auto_map):
            if "--" not in entry:  # else the code is in another repository
                needed.add(entry.partition(".")[0] + ".py")
    if not needed:
        return []
    if not with_code:
        raise _unfit(
            f"the model brings its own code (`auto_map` names {', '.join(sorted(needed))}), which "
            "is only uploaded if asked for",
            "`auto_map`",
            "Read that code, then use `--with-code` (`with_code=True`).",
        )
    # They import one another, and `auto_map` does not say which.
    return sorted(needed | {name for name in names if name.endswith(".py")})


# ---- what is private ---------------------------------------------------------------------------


def check_private(folder: Path, name: str) -> None:
    """Refuse a text file that holds an access token or a path of this machine.

    Raises:
        EPMQInputError: naming the file and where in it, not what was found.
    """
    if Path(name).suffix not in _TEXT:
        return
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unfit(f"`{name}` cannot be read: {reason_of(error)}", f"`{name}`") from error
    if (token := _TOKEN.search(text)) is not None:
        raise _unfit(
            f"`{name}` holds what looks like an access token in line {_line(text, token.start())}",
            f"`{name}`",
            "Remove it, and make a new token: this one may be known already.",
        )
    if name in _VOCABULARIES:
        return
    remedy = "Write a name in its place; nobody else has this path."
    for own in _own_paths(folder):
        if (found := re.search(rf"(?<!\w){re.escape(own)}(?!\w)", text)) is not None:
            where = _line(text, found.start())
            raise _unfit(
                f"`{name}` names a folder of this machine in line {where}", f"`{name}`", remedy
            )
    if name.endswith(".json"):
        for key, value in _leaves(_parsed(text, name)):
            if _WHOLE_PATH.fullmatch(value) or _PATH.search(value):
                raise _unfit(f"`{name}` holds a path of a machine in `{key}`", f"`{name}`", remedy)
    elif name.endswith(".md") and (path := _PATH.search(text)) is not None:
        where = _line(text, path.start())
        raise _unfit(f"`{name}` holds a path of a machine in line {where}", f"`{name}`", remedy)


def _own_paths(folder: Path) -> set[str]:
    """Folders of this machine that no published file has a reason to name."""
    places = {folder.resolve(), Path.cwd()}
    home = os.path.expanduser("~")
    if home != "~":
        places.add(Path(home))
    # "/x" and the like would be found in any text.
    return {str(place) for place in places if len(place.parts) > 2}


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unfit(
            f"`{name}` is not readable as JSON: {reason_of(error)}", f"`{name}`"
        ) from error


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of JSON data, keys included, with the key that leads there."""
    left = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, Mapping):
            left += [(str(each), item) for each, item in value.items()]
            left += [(key, str(each)) for each in value]
        elif isinstance(value, list):
            left += [(key, item) for item in value]


def _strings(value: Any) -> Iterator[str]:
    """The strings of ``auto_map``: class -> "module.Class", or a list of such."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return (text for each in values for _, text in _leaves(each))


# ---- the card ----------------------------------------------------------------------------------


def _license(folder: Path) -> Any:
    """What a card says; whether its metadata is as it should be, the hub itself says."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(folder / CARD_NAME).data.license
    except Exception as error:  # PyYAML and the library raise many kinds
        raise _unfit(
            f"the metadata of `{CARD_NAME}` is not readable: {reason_of(error)}", f"`{CARD_NAME}`"
        ) from error
