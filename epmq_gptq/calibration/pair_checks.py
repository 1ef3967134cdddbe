"""What a pair may be: what a source-and-target model is asked, and what it should answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..io.declared import shown
from .row_checks import Row, are_ids, bad_row, flat, picked, row_of

# What a source-and-target model answers with, by what it is asked with.
TARGET_OF = {"text": "target", "input_ids": "labels"}
_IGNORED_LABEL = -100  # as transformers has it: padding of the labels


def pair_row_of(
    data: Any,
    place: str,
    subject: str,
    *,
    column: str | None = None,
    target_column: str | None = None,
    bare: bool = False,
) -> Row | None:
    """The pair that ``data`` holds, of kind "text" or "input_ids"; None where it is blank.

    Raises:
        EPMQInputError: it holds none, or something else.
    """
    if bare and column is None and isinstance(data, (list, tuple)) and len(data) == 2:
        data = dict(zip(("text", "target"), data, strict=True))
        if not all(isinstance(value, str) for value in data.values()):
            data = {"input_ids": data["text"], "labels": data["target"]}
    if not isinstance(data, Mapping):
        cause = f"a row should hold a text and its target, got {shown(data)}"
        raise bad_row(place, cause, subject, 'Write `{"text": "…", "target": "…"}`.')
    # The mask of a padded row says which of its tokens are its own.
    key, value = picked(data, column, tuple(TARGET_OF), place, subject)
    asked = row_of(
        {key: value, "attention_mask": data.get("attention_mask")}, place, subject, column=key
    )
    if asked is None:
        return None
    if asked.kind not in TARGET_OF:
        cause = f"`{key}` should be a string or a list of token ids, got {shown(value)}"
        raise bad_row(place, cause, subject, "Correct the row.")
    if asked.mask is not None:
        cause = "`attention_mask` hides tokens inside of the row"
        raise bad_row(place, cause, subject, "Take the hidden tokens out of the row.")
    name = target_column or TARGET_OF[asked.kind]
    if name not in data:
        has = ", ".join(str(other)[:40] for other in list(data)[:10])
        raise bad_row(
            place,
            f"there is no `{name}`, what the model should answer; it has {has}",
            subject,
            "Add it, or name the key that holds it with `target_column`.",
        )
    return Row(
        asked.kind, asked.value, place, target=_target(data[name], name, asked.kind, place, subject)
    )


def _target(value: Any, name: str, kind: str, place: str, subject: str) -> str | list[int]:
    if isinstance(value, str) and kind == "text":
        return value
    ids = flat(value)
    if kind == "input_ids" and ids and are_ids(ids):
        ids = [int(each) for each in ids]
        while ids and ids[-1] == _IGNORED_LABEL:
            ids.pop()
        if ids and min(ids) >= 0:
            return ids
    wanted = "a string" if kind == "text" else "a list of token ids"
    cause = f"`{name}` should be {wanted}, as the other half is, got {shown(value)}"
    raise bad_row(place, cause, subject, "Correct the row.")
