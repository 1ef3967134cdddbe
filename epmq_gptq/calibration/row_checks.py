"""What a calibration row may be: a text, a chat, token ids, or a pair of texts."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EPMQInputError
from ..io.declared import shown

KINDS = ("text", "messages", "input_ids")


@dataclass(frozen=True)
class Row:
    """One checked row, not tokenised yet.

    Attributes:
        kind: "text", "messages" or "input_ids"; of images: "image" or "pixel_values".
        value: the string, the chat messages, the token ids, or the picture.
        place: where it was found, for errors.
        mask: of token ids, where some in between are hidden: 0 or 1 for each; else None.
        target: of a pair: what the model should answer, a string or token ids; of an image: the
            text that goes with it, or None.
    """

    kind: str
    value: Any
    place: str
    mask: list[int] | None = None
    target: Any = None


def bad_row(place: str, cause: str, subject: str, remedy: str) -> EPMQInputError:
    """The error of a row that cannot be used."""
    return EPMQInputError(f"{place}: {cause}.", code="EPMQ-F32", subject=subject, remedy=remedy)


def row_of(
    data: Any,
    place: str,
    subject: str,
    *,
    column: str | None = None,
    target_column: str | None = None,
    bare: bool = False,
) -> Row | None:
    """The row that ``data`` holds; None where it is blank.

    Raises:
        EPMQInputError: it holds none, or something else.
    """
    if isinstance(data, Mapping):
        key, value = picked(data, column, KINDS, place, subject)
        mask = data.get("attention_mask")
    elif bare and column is None:
        key, value, mask = None, data, None
    else:
        cause = f"a row should be a mapping, got {type(data).__name__}"
        raise bad_row(place, cause, subject, 'Write `{"text": "…"}`.')
    listed = flat(value)
    if value is None or listed == [] or (isinstance(value, str) and not value.strip()):
        return None
    kind = None
    if isinstance(value, str):
        kind = "text"
    elif listed and are_ids(listed):
        kind, value = "input_ids", [int(item) for item in listed]
    elif listed and all(map(_is_message, listed)):
        kind, value = "messages", listed
    if kind is None or (key in KINDS and kind != key):
        raise bad_row(
            place,
            f"{f'`{key}`' if key else 'a row'} should be a string (text), a list of token ids "
            "(input_ids) or of chat messages with `role` and `content` (messages), got "
            f"{shown(value)}",
            subject,
            "Correct the row.",
        )
    return _masked(value, mask, place, subject) if kind == "input_ids" else Row(kind, value, place)


def picked(
    data: Mapping, column: str | None, kinds: Sequence[str], place: str, subject: str
) -> tuple[str, Any]:
    """The key with the row, one of ``kinds`` where no column is named, and what it holds.

    Raises:
        EPMQInputError: there is none, or more than one.
    """
    if column is not None:
        keys = [column] if column in data else []
    else:
        # Tables fill up with None what a row does not have.
        present = [kind for kind in kinds if kind in data]
        keys = [kind for kind in present if data[kind] is not None] or present[:1]
    if len(keys) == 1:
        return keys[0], data[keys[0]]
    wanted = f"`{column}`" if column is not None else "exactly one of " + ", ".join(kinds)
    if "role" in data and "content" in data:
        remedy = 'Put the chat into a row: `{"messages": [{"role": …, "content": …}]}`.'
    else:
        remedy = "Name the right one with `column`, or take the others out."
    has = ", ".join(str(key)[:40] for key in list(data)[:10]) or "nothing"
    raise bad_row(place, f"should have {wanted}, it has {has}", subject, remedy)


def flat(value: Any) -> list[Any] | None:
    """A list, or what an array or tensor holds; None for anything else.

    A tokenizer that was asked for tensors, or for a list of texts, gives one row as a batch of one.
    """
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return None
    if len(value) == 1 and isinstance(value[0], (list, tuple)):
        value = value[0]
    return list(value)


def are_ids(values: Sequence[Any]) -> bool:
    """Whether these are token ids, at least one."""
    return len(values) > 0 and all(
        isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in values
    )


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and isinstance(item.get("role"), str)
        and bool(item["role"])
        and "content" in item
    )


def _masked(ids: list[int], mask: Any, place: str, subject: str) -> Row:
    """Hidden tokens at both ends are padding, and no part of the row."""
    if mask is not None:
        values = flat(mask)
        if values is None or not all(
            isinstance(v, numbers.Integral) and v in (0, 1) for v in values
        ):
            cause = f"`attention_mask` should be a list of 0 and 1, got {shown(mask)}"
            raise bad_row(place, cause, subject, "Correct it or leave it out.")
        if len(values) != len(ids):
            raise bad_row(
                place,
                f"`attention_mask` has {len(values)} entries, `input_ids` has {len(ids)}; they "
                "should be as long",
                subject,
                "Correct it or leave it out.",
            )
        mask = [int(v) for v in values]
        if 1 not in mask:
            cause = "`attention_mask` hides every token"
            raise bad_row(place, cause, subject, "Take the row out.")
        kept = slice(mask.index(1), len(mask) - mask[::-1].index(1))
        ids, mask = ids[kept], mask[kept]
    if min(ids) < 0:
        cause = f"token id {min(ids)} is negative"
        raise bad_row(place, cause, subject, "Leave out padding and ignored labels.")
    return Row("input_ids", ids, place, mask if mask and 0 in mask else None)
