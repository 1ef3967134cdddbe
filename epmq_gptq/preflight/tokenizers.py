"""F36: do the experts' tokenizers give a token the same id as the merged model's? Read as data."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EPMQInputError
from ..folders import check_file, list_folder, read_json
from .findings import Finding

# Bytes of a tokenizer.json; the largest in use (Gemma 3) have 33 million.
MAX_TOKENIZER_BYTES = 200_000_000
_SAMPLE = 3
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


def compare_tokenizers(merged: Path | None, other: Path | None, what: str) -> Iterator[Finding]:
    """Warn where one token has two ids, or one of the two models does not know it.

    Args:
        merged, other: folders; None for a model in memory, of which nothing is known.
        what: how the findings call the other one.
    """
    if merged is None or other is None:
        return
    try:
        if _same_file(merged, other, what):
            return
        mine = read_vocabulary(merged, "the merged model")
        theirs = read_vocabulary(other, what)
    except EPMQInputError as error:
        yield Finding.from_error(error, subject=what, level="warning")
        return
    if mine is None or theirs is None:
        if _same_file(merged, other, what, _BINARY) is False:
            yield _finding(what, "its tokenizer file has other bytes than the merged model's")
        return
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
    if parts:
        yield _finding(what, "; ".join(parts), bool(moved))


def _finding(what: str, cause: str, ids_differ: bool = True) -> Finding:
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
