"""What a row of images may be: a picture in any form, or pixel values that a processor made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io.declared import shown
from .row_checks import Row, bad_row, picked

IMAGE_KINDS = ("image", "pixel_values")


def image_row_of(
    data: Any,
    place: str,
    subject: str,
    *,
    column: str | None = None,
    target_column: str | None = None,
    bare: bool = False,
) -> Row | None:
    """The row that ``data`` holds; None where it is blank.

    A row is of kind "image" (a PIL image, an array ``(H, W)`` or ``(H, W, 1|3|4)`` of uint8, a
    path, or the ``{"bytes", "path"}`` of ``datasets``) or "pixel_values" (``(C, H, W)`` floats).
    Its ``text``, where it has one, is for models with a text tower.

    Raises:
        EPMQInputError: it holds none, or something else.
    """
    text = None
    if isinstance(data, Mapping) and not _is_stored(data):
        key, value = picked(data, column, IMAGE_KINDS, place, subject)
        text = data.get("text")
    elif bare and column is None:
        key, value = None, data
    else:
        cause = f"a row should be a mapping, got {type(data).__name__}"
        raise bad_row(place, cause, subject, 'Write `{"image": …}`.')
    if value is None:
        return None
    kind = _kind(value)
    if kind is None or (key in IMAGE_KINDS and kind != key):
        raise bad_row(
            place,
            f"{f'`{key}`' if key else 'a row'} should be a picture (a PIL image, a uint8 array of "
            "(H, W, 3), a file; image) or floats of (C, H, W) (pixel_values), got "
            f"{_described(value)}",
            subject,
            "Correct the row.",
        )
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise bad_row(
            place, f"`text` should be a string, got {shown(text)}", subject, "Correct the row."
        )
    return Row(kind, value, place, target=text)


def _is_stored(value: Any) -> bool:
    """Whether this is how ``datasets`` hands out an image that it has not decoded."""
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _kind(value: Any) -> str | None:
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


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return shown(value)
    return f"{type(value).__name__} of {getattr(value, 'dtype', '?')} {tuple(shape)}"
