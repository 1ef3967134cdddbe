"""F36: do the experts' tokenizers give a token the same id as the merged model's? Read as data."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..io.folders import check_file, list_folder, read_json
from .findings import Finding

# Bytes of a tokenizer.json; the largest in use (Gemma 3) have 33 million.
MAX_TOKENIZER_BYTES = 200_000_000
_SAMPLE = 3
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_OTHER_BYTES = "its tokenizer file has other bytes than the merged model's"
# Told apart but never read: what a SentencePiece file means is in its program.
_BINARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_vocabulary(folder: Path, what: str) -> dict[str, int] | None:
    """Token → id of a folder's ``tokenizer.json`` or ``vocab.json``; None where it has neither.

    Raises:
        EPMQInputError: the file is a link out of the folder, too large, or no JSON object.
    """
    names = list_folder(folder, what)
    if "tokenizer.json" in names:
        content = read_json(folder, "tokenizer.json", what, max_bytes=MAX_TOKENIZER_BYTES)
        model = content.get("model")
        vocabulary = _pairs(model.get("vocab") if isinstance(model, Mapping) else None)
        added = content.get("added_tokens")
    elif "vocab.json" in names:
        vocabulary = _pairs(read_json(folder, "vocab.json", what, max_bytes=MAX_TOKENIZER_BYTES))
        added = None
    else:
        return None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and isinstance(token.get("id"), int):
            vocabulary[str(token.get("content"))] = token["id"]
    return vocabulary


def _pairs(vocabulary: Any) -> dict[str, int]:
    if isinstance(vocabulary, Mapping):
        return {str(token): index for token, index in vocabulary.items() if isinstance(index, int)}
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        return {
            str(entry[0]): index
            for index, entry in enumerate(vocabulary)
            if isinstance(entry, list) and entry
        }
    return {}


class Tokenizers:
    """Compares models' tokenizers with the merged model's.

    A vocabulary takes a second to read, and there may be twenty experts: the merged model's is read
    once, and of experts whose file is the same the first one's.

    Args:
        merged: folder of the merged model; None for one in memory, of which nothing is known.
    """

    def __init__(self, merged: Path | None):
        self._merged = merged
        self._mine: dict[str, int] | None = None
        self._known: list[tuple[Path, tuple[str, bool] | None]] = []  # file -> what differs

    def compare(self, other: Path | None, what: str) -> Iterator[Finding]:
        """Warn where one token has two ids, or one of the two models does not know it.

        Args:
            other: folder; None for a model in memory.
            what: how the findings call it.
        """
        if self._merged is None or other is None:
            return
        try:
            differing = self._differing(self._merged, other, what)
        except EPMQInputError as error:
            yield Finding.from_error(error, subject=what, level="warning")
            return
        if differing is not None:
            yield _finding(what, *differing)

    def _differing(self, merged: Path, other: Path, what: str) -> tuple[str, bool] | None:
        if _same_file(merged, other, what):
            return None
        file = next((name for name in _VOCABULARIES if name in list_folder(other, what)), None)
        if self._mine is None:
            self._mine = read_vocabulary(merged, "the merged model")
        if self._mine is None or file is None:
            same = _same_file(merged, other, what, _BINARY)
            return None if same is not False else (_OTHER_BYTES, True)
        path = check_file(other, file, what)
        for known, differing in self._known:
            if filecmp.cmp(known, path, shallow=False):
                return differing
        differing = _differences(self._mine, read_vocabulary(other, what) or {})
        self._known.append((path, differing))
        return differing


def _differences(mine: dict[str, int], theirs: dict[str, int]) -> tuple[str, bool] | None:
    """What differs, and whether one token has two ids; None for one and the same vocabulary."""
    if mine == theirs:
        return None
    moved = [token for token in mine if token in theirs and mine[token] != theirs[token]]
    mine_only = sum(token not in theirs for token in mine)
    theirs_only = sum(token not in mine for token in theirs)
    parts = []
    if moved:
        sample = ", ".join(f"{t!r} {theirs[t]} instead of {mine[t]}" for t in moved[:_SAMPLE])
        parts.append(f"{len(moved):,} tokens have other ids ({sample})")
    if mine_only:
        parts.append(f"it lacks {mine_only:,} tokens of the merged model's")
    if theirs_only:
        new = [token for token in theirs if token not in mine][:_SAMPLE]
        sample = ", ".join(f"{token!r} {theirs[token]}" for token in new)
        parts.append(f"{theirs_only:,} tokens are its own ({sample})")
    return "; ".join(parts), bool(moved)


def _finding(what: str, cause: str, ids_differ: bool) -> Finding:
    remedy = "The merged model's tokenizer is used; do not give rows of token ids that the expert's"
    return Finding(
        "warning",
        "EPMQ-F36",
        what,
        f"{what}: {cause}.",
        f"{remedy} made." if ids_differ else f"{remedy} made with tokens of its own.",
    )


def _same_file(
    merged: Path, other: Path, what: str, names: tuple[str, ...] = ("tokenizer.json",)
) -> bool | None:
    """Whether the first of these files that both have is the same; None where there is none."""
    mine, theirs = list_folder(merged, "the merged model"), list_folder(other, what)
    name = next((name for name in names if name in mine and name in theirs), None)
    if name is None:
        return None
    return filecmp.cmp(
        check_file(merged, name, "the merged model"), check_file(other, name, what), shallow=False
    )
