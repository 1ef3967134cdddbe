"""What calibration rows are for a kind of model: text, images, or pairs of texts.

A form says which keys a row may have and checks one row; nothing of a model is needed for that.
How rows become a model's inputs is in ``tokens.py``, ``image_rows.py`` and ``pair_rows.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .image_checks import image_row_of
from .pair_checks import pair_row_of
from .row_checks import KINDS, Row, row_of


@dataclass(frozen=True)
class RowForm:
    """The rows of one kind of model.

    Attributes:
        name: "text", "images" or "pairs".
        kinds: keys of a mapping that hold the row; others are read where they are present.
        others: keys that go with it.
        check: ``(data, place, subject, column=, target_column=, bare=) -> Row | None``.
        from_text: whether a line of a text file is a row.
    """

    name: str
    kinds: tuple[str, ...]
    others: tuple[str, ...]
    check: Callable[..., Row | None]
    from_text: bool = False


TEXT = RowForm("text", KINDS, ("attention_mask",), row_of, from_text=True)
IMAGES = RowForm("images", ("image", "pixel_values"), ("text",), image_row_of)
PAIRS = RowForm("pairs", ("text", "input_ids"), ("target", "labels"), pair_row_of)

# What a mapping has that is a row and no set of options.
ROW_KEYS = tuple(dict.fromkeys(kind for form in (TEXT, IMAGES, PAIRS) for kind in form.kinds))

# By `model_type` of config.json: what needs no model to be known.
_OF_MODEL_TYPE = {"clip": IMAGES, "clip_vision_model": IMAGES, "t5": PAIRS}


def form_of(config: Mapping[str, Any] | Any) -> RowForm:
    """The form of a model's rows, by its configuration: text where nothing else is known.

    Args:
        config: what config.json holds, or the object.
    """
    if isinstance(config, Mapping):
        model_type = config.get("model_type")
    else:
        model_type = getattr(config, "model_type", None)
    return _OF_MODEL_TYPE.get(model_type, TEXT) if isinstance(model_type, str) else TEXT
