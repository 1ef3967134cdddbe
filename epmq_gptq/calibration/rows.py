"""What a calibration row may be, for each kind of model: text, images, or pairs of texts.

A :class:`RowForm` says which keys a row may have and checks one row; nothing of a model is needed
for that. How rows become a model's inputs is in ``text.py``, ``images.py`` and ``pairs.py``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EPMQInputError
from ..io.declared import shown
from ..io.families import family_of


class Where(NamedTuple):
    """Where rows or a row were found and whose they are, for errors."""

    place: str
    subject: str

    def bad(self, cause: str, remedy: str, code: str = "EPMQ-F32") -> EPMQInputError:
        """The error of a row, or of a source of rows, that cannot be used."""
        return EPMQInputError(
            f"{self.place}: {cause}.", code=code, subject=self.subject, remedy=remedy
        )


@dataclass(frozen=True)
class Row:
    """One checked row, not encoded yet.

    Attributes:
        kind: "text", "messages" or "input_ids"; of images: "image" or "pixel_values".
        value: the string, the chat messages, the token ids, or the picture.
        where: it was found, for errors.
        mask: of token ids, where some in between are hidden: 0 or 1 for each; else None.
        target: of a pair: what the model should answer, a string or token ids; of an image: the
            text that goes with it, or None.
    """

    kind: str
    value: Any
    where: Where
    mask: list[int] | None = None
    target: Any = None


class Keys(NamedTuple):
    """How the rows of a source are written.

    Attributes:
        column: the key with the row, where the user named one.
        target_column: of pairs: the key with the answer, where the user named one.
        bare: whether a string, a list of ids or a picture may stand for a row.
    """

    column: str | None = None
    target_column: str | None = None
    bare: bool = False


@dataclass(frozen=True)
class RowForm:
    """The rows of one kind of model.

    Attributes:
        name: "text", "images" or "pairs".
        kinds: keys of a mapping that hold the row; others are read where they are present.
        others: keys that go with it.
        check: ``(data, keys, where)`` → the row; None where it is blank. Raises an EPMQInputError
            for what is no row.
        example: a row, for errors.
        from_text: whether a line of a text file is a row.
    """

    name: str
    kinds: tuple[str, ...]
    others: tuple[str, ...]
    check: Callable[[Any, Keys, Where], Row | None]
    example: str
    from_text: bool = False


def _picked(data: Any, keys: Keys, where: Where, form: RowForm) -> tuple[str | None, Any]:
    """The key with the row, one of the form's where no column is named, and what it holds."""
    if not isinstance(data, Mapping):
        if keys.bare and keys.column is None:
            return None, data
        cause = f"a row should be a mapping, got {type(data).__name__}"
        raise where.bad(cause, f"Write `{form.example}`.")
    if keys.column is not None:
        found = [keys.column] if keys.column in data else []
    else:
        # Tables fill up with None what a row does not have.
        present = [kind for kind in form.kinds if kind in data]
        found = [kind for kind in present if data[kind] is not None] or present[:1]
    if len(found) == 1:
        return found[0], data[found[0]]
    wanted = f"`{keys.column}`" if keys.column else "exactly one of " + ", ".join(form.kinds)
    if "role" in data and "content" in data:
        remedy = 'Put the chat into a row: `{"messages": [{"role": …, "content": …}]}`.'
    else:
        remedy = "Name the right one with `column`, or take the others out."
    raise where.bad(f"should have {wanted}, it has {_keys_of(data) or 'nothing'}", remedy)


def _keys_of(data: Mapping) -> str:
    return ", ".join(str(key)[:40] for key in list(data)[:10])


def _unlike(key: str | None, rule: str, got: str, where: Where) -> EPMQInputError:
    name = f"`{key}`" if key else "a row"
    return where.bad(f"{name} should be {rule}, got {got}", "Correct the row.")


# ---- text --------------------------------------------------------------------------------------


def _text_row(data: Any, keys: Keys, where: Where) -> Row | None:
    key, value = _picked(data, keys, where, TEXT)
    listed = _flat(value)
    if value is None or listed == [] or (isinstance(value, str) and not value.strip()):
        return None
    kind = None
    if isinstance(value, str):
        kind = "text"
    elif listed and are_ids(listed):
        kind, value = "input_ids", [int(item) for item in listed]
    elif listed and all(map(_is_message, listed)):
        kind, value = "messages", listed
    if kind is None or (key in TEXT.kinds and kind != key):
        rule = (
            "a string (text), a list of token ids (input_ids) or of chat messages with `role` and "
            "`content` (messages)"
        )
        raise _unlike(key, rule, shown(value), where)
    if kind != "input_ids":
        return Row(kind, value, where)
    return _ids_row(value, data.get("attention_mask") if key else None, where)


def _ids_row(ids: list[int], mask: Any, where: Where) -> Row:
    """Hidden tokens at both ends are padding, and no part of the row."""
    if mask is not None:
        mask = _mask(mask, len(ids), where)
        kept = slice(mask.index(1), len(mask) - mask[::-1].index(1))
        ids, mask = ids[kept], mask[kept]
    if min(ids) < 0:
        cause = f"token id {min(ids)} is negative"
        raise where.bad(cause, "Leave out padding and ignored labels.")
    return Row("input_ids", ids, where, mask if mask and 0 in mask else None)


def _mask(mask: Any, length: int, where: Where) -> list[int]:
    values = _flat(mask)
    remedy = "Correct it or leave it out."
    if values is None or not all(isinstance(v, numbers.Integral) and v in (0, 1) for v in values):
        cause = f"`attention_mask` should be a list of 0 and 1, got {shown(mask)}"
        raise where.bad(cause, remedy)
    if len(values) != length:
        cause = f"`attention_mask` has {len(values)} entries, `input_ids` has {length}"
        raise where.bad(f"{cause}; they should be as long", remedy)
    if 1 not in values:
        raise where.bad("`attention_mask` hides every token", "Take the row out.")
    return [int(v) for v in values]


def _flat(value: Any) -> list[Any] | None:
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
    if not isinstance(item, Mapping) or "content" not in item:
        return False
    return isinstance(item.get("role"), str) and bool(item["role"])


TEXT = RowForm(
    "text",
    ("text", "messages", "input_ids"),
    ("attention_mask",),
    _text_row,
    '{"text": "…"}',
    from_text=True,
)


# ---- images ------------------------------------------------------------------------------------


def _image_row(data: Any, keys: Keys, where: Where) -> Row | None:
    """A picture (PIL image, uint8 array ``(H, W)`` or ``(H, W, 1|3|4)``, path, or what ``datasets``
    hands out) or pixel values (floats ``(C, H, W)``), with a text for models with a text tower."""
    if _is_stored(data):
        key, value, text = None, data, None
        if not keys.bare or keys.column is not None:
            raise where.bad("a row should be a mapping", f"Write `{IMAGES.example}`.")
    else:
        key, value = _picked(data, keys, where, IMAGES)
        text = data.get("text") if key else None
    if value is None:
        return None
    kind = _kind_of_image(value)
    if kind is None or (key in IMAGES.kinds and kind != key):
        rule = (
            "a picture (a PIL image, a uint8 array of (H, W, 3), a file; image) or floats of "
            "(C, H, W) (pixel_values)"
        )
        shape = getattr(value, "shape", None)
        got = f"{type(value).__name__} of {getattr(value, 'dtype', '?')} {shape}"
        raise _unlike(key, rule, shown(value) if shape is None else got, where)
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise _unlike("text", "a string", shown(text), where)
    return Row(kind, value, where, target=text)


def _is_stored(value: Any) -> bool:
    """Whether this is how ``datasets`` hands out an image that it has not decoded."""
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _kind_of_image(value: Any) -> str | None:
    from PIL import Image

    if isinstance(value, (Image.Image, Path)) or _is_stored(value):
        return "image"
    if isinstance(value, str):
        return "image" if value.strip() else None
    dtype, shape = str(getattr(value, "dtype", "")), getattr(value, "shape", ())
    if dtype.endswith("uint8"):
        fits = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4))
        return "image" if fits else None
    if "float" in dtype and len(shape) == 3:
        return "pixel_values"
    return None


IMAGES = RowForm("images", ("image", "pixel_values"), ("text",), _image_row, '{"image": …}')


# ---- pairs -------------------------------------------------------------------------------------

# What a source-and-target model answers with, by what it is asked with.
_TARGET_OF = {"text": "target", "input_ids": "labels"}
_IGNORED_LABEL = -100  # as transformers has it: padding of the labels


def _pair_row(data: Any, keys: Keys, where: Where) -> Row | None:
    """A text and its target, or the token ids of both."""
    if keys.bare and keys.column is None and isinstance(data, (list, tuple)) and len(data) == 2:
        texts = all(isinstance(value, str) for value in data)
        names = ("text", "target") if texts else ("input_ids", "labels")
        data = dict(zip(names, data, strict=True))
    if not isinstance(data, Mapping):
        cause = f"a row should hold a text and its target, got {shown(data)}"
        raise where.bad(cause, f"Write `{PAIRS.example}`.")
    key, value = _picked(data, keys, where, PAIRS)
    # The mask of a padded row says which of its tokens are its own.
    asked = _text_row(
        {key: value, "attention_mask": data.get("attention_mask")}, Keys(column=key), where
    )
    if asked is None:
        return None
    if asked.kind not in _TARGET_OF:
        raise _unlike(key, "a string or a list of token ids", shown(value), where)
    if asked.mask is not None:
        cause = "`attention_mask` hides tokens inside of the row"
        raise where.bad(cause, "Take the hidden tokens out of the row.")
    name = keys.target_column or _TARGET_OF[asked.kind]
    if name not in data:
        raise where.bad(
            f"there is no `{name}`, what the model should answer; it has {_keys_of(data)}",
            "Add it, or name the key that holds it with `target_column`.",
        )
    return Row(asked.kind, asked.value, where, target=_target(data[name], name, asked.kind, where))


def _target(value: Any, name: str, kind: str, where: Where) -> str | list[int]:
    if kind == "text":
        if isinstance(value, str):
            return value
    elif are_ids(listed := _flat(value) or []):
        ids = [int(each) for each in listed]
        while ids and ids[-1] == _IGNORED_LABEL:
            ids.pop()
        if ids and min(ids) >= 0:
            return ids
    wanted = "a string" if kind == "text" else "a list of token ids"
    raise _unlike(name, f"{wanted}, as the other half is", shown(value), where)


PAIRS = RowForm(
    "pairs",
    ("text", "input_ids"),
    ("target", "labels"),
    _pair_row,
    '{"text": "…", "target": "…"}',
)


# ---- which form --------------------------------------------------------------------------------

_FORMS = {form.name: form for form in (TEXT, IMAGES, PAIRS)}


def form_of(config: Mapping[str, Any] | Any) -> RowForm:
    """The form of a model's rows, by its configuration: text where nothing else is known.

    Args:
        config: what config.json holds, or the object.
    """
    if isinstance(config, Mapping):
        model_type = config.get("model_type")
    else:
        model_type = getattr(config, "model_type", None)
    family = family_of(model_type)
    return TEXT if family is None else _FORMS[family.row_form]
