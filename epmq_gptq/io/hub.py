"""Models of a hub: every file from one commit, and only the files that a model needs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EPMQInputError
from .folders import CARD_NAME

COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Folders hold other formats and training states; `consolidated*` is a second copy of the weights.
_UNNEEDED = ("*/*", "consolidated*")
_TIMEOUT_S = 30


class HubId(NamedTuple):
    """``org/name`` and the branch, tag or commit after the ``@``, if any."""

    repository: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which is the same for everybody and for ever."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str | None) -> str:
        """The id of the same repository at a commit."""
        return f"{self.repository}@{commit}" if commit else self.repository


class Fetched(NamedTuple):
    """A snapshot in the hub's cache."""

    repository: str
    commit: str
    folder: Path


def parse_hub_id(text: str) -> HubId | None:
    """``org/name[@revision]``; None for anything else."""
    repository, at, revision = text.partition("@")
    if _REPOSITORY.fullmatch(repository) is None or (at and not revision.strip()):
        return None
    if ".." in revision:  # git knows no such name, and the cache would take it for a path
        return None
    return HubId(repository, revision or None)


def local_folder(text: str, what: str) -> Path | None:
    """The existing folder that a spec means; None for a hub id.

    Raises:
        EPMQInputError: it is a file, or a path at which there is nothing.
    """
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        path, exists = Path(text), False
    # The last part of an absolute path is enough: errors get posted.
    shown = path.name if path.is_absolute() else text
    if exists:
        raise EPMQInputError(
            f"{what}: `{shown}` is a file, not a checkpoint folder.",
            code="EPMQ-F15",
            subject=what,
            remedy="Give the folder that holds it.",
        )
    if parse_hub_id(text) is not None:
        return None
    if "+" in text:
        shown = "+".join(Path(part.strip()).name for part in text.split("+"))
        raise EPMQInputError(
            f"{what}: `{shown}` is no existing folder, and a base with an adapter is no whole "
            "model, which is needed here.",
            code="EPMQ-F34",
            subject=what,
            remedy="Load the adapter on its base with peft, `merge_and_unload()` it, save that "
            "model and give its folder.",
        )
    raise EPMQInputError(
        f"{what}: `{shown}` is neither an existing folder nor a hub id of the form "
        "`org/name@revision`.",
        code="EPMQ-F15",
        subject=what,
        remedy="Correct the path or the id.",
    )


def fetch(
    text: str, *, what: str, patterns: Sequence[str], require_pinned: bool = False
) -> Fetched:
    """The files of a hub repository that match ``patterns``; from the cache what is there already.

    Args:
        text: ``org/name[@revision]``, see :func:`parse_hub_id`.
        what: how errors call it.
        patterns: names of files; folders of the repository are left out.
        require_pinned: refuse a revision that is no 40-digit commit.

    Raises:
        EPMQInputError: no such repository, no access, or neither reachable nor in the cache.
    """
    asked = parse_hub_id(text)
    assert asked is not None, text
    if require_pinned and not asked.is_pinned:
        raise EPMQInputError(
            f"{what}: `{text}` is not pinned to a commit, and `require_pinned` is on.",
            code="EPMQ-F16",
            subject=what,
            remedy="Write `org/name@` and the 40 digits of the commit.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        folder = snapshot_download(
            asked.repository,
            revision=asked.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_UNNEEDED),
        )
    except (OSError, ValueError, HTTPError, EntryNotFoundError) as error:
        raise _refusal(asked, what, error) from error
    # A snapshot is named after its commit, whatever branch or tag was asked for.
    return Fetched(asked.repository, Path(folder).name, Path(folder))


def fetch_card(fetched: Fetched) -> None:
    """Put a repository's ``README.md`` into its snapshot: it says under which licence a model is.

    A model works without: whatever keeps it from coming is left at that. It is not one of the
    patterns of :func:`fetch`, or snapshots of earlier versions would count as incomplete.
    """
    if (fetched.folder / CARD_NAME).exists():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    with contextlib.suppress(OSError, ValueError, HTTPError, EntryNotFoundError):
        hf_hub_download(fetched.repository, CARD_NAME, revision=fetched.commit)


def listed_files(fetched: Fetched) -> set[str]:
    """The names of all files of a fetched repository, those included that were left there."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        from huggingface_hub import get_cached_repo_tree

        tree = get_cached_repo_tree(fetched.repository, revision=fetched.commit)
    except (ImportError, CachedRepoTreeNotFoundError):
        return {file.name for file in fetched.folder.iterdir()}
    return {file.path for file in tree}


def is_offline() -> bool:
    """Whether the hub's library was told to use its cache only (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class Remote:
    """Single files and ranges of a hub repository at one commit; nothing of it is kept."""

    def __init__(self, asked: HubId, commit: str, what: str):
        self.repository, self.commit = asked.repository, commit
        self._asked, self._what = asked, what
        self._starts: dict[str, int] = {}

    def headers(self) -> dict[str, Any]:
        """Safetensors file → its header, as ``huggingface_hub`` reads it."""
        from huggingface_hub.errors import NotASafetensorsRepoError
        from huggingface_hub.hf_api import api

        with _told(self._asked, self._what):
            try:
                found = api.get_safetensors_metadata(self.repository, revision=self.commit)
            except NotASafetensorsRepoError as error:
                raise EPMQInputError(
                    f"{self._what}: `{self.repository}` has no safetensors weights.",
                    code="EPMQ-F14",
                    subject=self._what,
                    remedy="Give one that has; pickle files are never opened.",
                ) from error
        return dict(found.files_metadata)

    def file(self, name: str) -> bytes | None:
        """A small file; None where there is no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        with _told(self._asked, self._what):
            try:
                return self._get(name)
            except EntryNotFoundError:
                return None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start:stop`` of the data of a safetensors file, the header not counted."""
        with _told(self._asked, self._what):
            if name not in self._starts:
                length = int.from_bytes(self._get(name, "bytes=0-7")[:8], "little")
                self._starts[name] = 8 + length
            first = self._starts[name] + start
            content = self._get(name, f"bytes={first}-{first + stop - start - 1}")
        if len(content) != stop - start:
            raise EPMQInputError(
                f"{self._what}: `{name}` is shorter than its header says.",
                code="EPMQ-F12",
                subject=f"`{name}`",
                remedy="Upload it again, or give a local folder.",
            )
        return content

    def _get(self, name: str, byte_range: str | None = None) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | ({"range": byte_range} if byte_range else {})
        url = hf_hub_url(self.repository, name, revision=self.commit)
        response = get_session().get(url, headers=headers, timeout=_TIMEOUT_S)
        hf_raise_for_status(response)
        return response.content


def open_remote(text: str, *, what: str) -> Remote:
    """A hub repository at the commit that ``org/name[@revision]`` means today.

    Raises:
        EPMQInputError: no such repository, no access, or not reachable.
    """
    from huggingface_hub.hf_api import api

    asked = parse_hub_id(text)
    assert asked is not None, text
    with _told(asked, what):
        commit = api.model_info(asked.repository, revision=asked.revision).sha
    return Remote(asked, commit, what)


@contextlib.contextmanager
def _told(asked: HubId, what: str) -> Iterator[None]:
    """Whatever a hub says no to becomes one of our errors."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except EPMQInputError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        raise _refusal(asked, what, error) from error


def _refusal(asked: HubId, what: str, error: Exception) -> EPMQInputError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = asked.at(asked.revision or "main")
    if isinstance(error, GatedRepoError):
        cause = f"`{asked.repository}` is gated: the hub gives it only to who was granted access"
        remedy = "Ask for access on its page, then `hf auth login` or set `HF_TOKEN`."
    elif isinstance(error, RevisionNotFoundError):
        cause = f"`{asked.repository}` has no revision `{asked.revision or 'main'}`"
        remedy = "Write a branch, a tag or a commit that it has."
    elif isinstance(error, RepositoryNotFoundError):
        cause = f"there is no such folder, and no `{asked.repository}` on the hub, or it is private"
        remedy = "Correct the id or the path; for a private one `hf auth login` or set `HF_TOKEN`."
    elif isinstance(error, LocalEntryNotFoundError):
        cause = f"`{name}` could not be fetched, and the hub's cache lacks it or a part of it: "
        # Only this error itself says which files of a snapshot are missing.
        incomplete = "incomplete" in str(error)
        cause += _reason(error if incomplete else error.__cause__ or error)
        remedy = "Try again with a connection to the hub, or give a local folder."
    else:
        cause = f"`{name}` could not be fetched from the hub: {_reason(error)}"
        remedy = "Try again later, or give a local folder."
    return EPMQInputError(f"{what}: {cause}.", code="EPMQ-F16", subject=what, remedy=remedy)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
