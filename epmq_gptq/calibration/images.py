"""Rows of images → pixel values, by the merged model's own image processor."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import EPMQInputError
from .draws import RowSet
from .encoded import EncodedCalibration, InputRules, RowCounts, in_turn, padded
from .rows import IMAGES, Row
from .text import TokenRules

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ImageRow(NamedTuple):
    """One image.

    Attributes:
        pixels: ``(C, H, W)`` fp32, as the model takes them.
        ids: tokens of its text, for a model with a text tower; else None.
    """

    pixels: torch.Tensor
    ids: list[int] | None = None

    @property
    def length(self) -> int:
        """Tokens of its text; its patches are as many as every other image's."""
        return len(self.ids or ())


@dataclass(frozen=True)
class ImageRules(InputRules):
    """What a merged vision model asks of its images.

    Attributes:
        size: height and width in pixels.
        channels: of an image.
        patch: height and width of a patch in pixels.
        processor: the model's image processor; None where its folder has none.
        text: rules of its text tower's tokens; None where it has none.
        needs_text: whether every image must have one.
    """

    size: int
    channels: int
    patch: int
    processor: Any = None
    text: TokenRules | None = None
    needs_text: bool = False

    form = IMAGES

    @classmethod
    def of(cls, config: Any, folder: Path, tokenizer: Any) -> ImageRules:
        """Those of a model of CLIP's kind, from its configuration and folder."""
        vision = getattr(config, "vision_config", None) or config
        text = getattr(config, "text_config", None)
        return cls(
            vision.image_size,
            vision.num_channels,
            vision.patch_size,
            _processor(folder),
            None if text is None else TokenRules.of_config(text, tokenizer),
        )

    @property
    def positions(self) -> int:
        """Tokens of an image in the model: its patches, and the class token."""
        return (self.size // self.patch) ** 2 + 1

    def encode(self, sets: Mapping[str, Sequence[RowSet]]) -> EncodedCalibration:
        """Pixel values of every expert's images.

        Raises:
            EPMQInputError: a picture cannot be read, or does not have the model's shape; a picture
                and no processor; texts for some of the rows only.
        """
        encoded = super().encode(sets)
        with_text = [row.ids is not None for each in encoded.rows.values() for row in each]
        if not all(with_text) and (any(with_text) or self.needs_text):
            raise EPMQInputError(
                f"`calibration`: {with_text.count(False)} of {len(with_text)} images have no "
                + ("`text`, which the text tower reads." if self.needs_text else "`text`."),
                code="EPMQ-F32",
                subject="`calibration`",
                remedy="Give all a text, or leave the rule of `dynamic` with `text_model` out."
                if self.needs_text
                else "Give all of them a text, or none.",
            )
        return encoded

    def batches(
        self, rows: Sequence[ImageRow], batch_size: int, **_: bool
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """See :meth:`InputRules.batches`."""
        for group in in_turn(rows, batch_size):
            batch = {"pixel_values": torch.stack([row.pixels for row in group])}
            tokens = len(group) * self.positions
            if group[0].ids is not None:
                texts = padded([row.ids for row in group], self.text.pad_id)
                batch |= {"input_ids": texts.ids, "attention_mask": texts.mask}
                tokens += int(texts.mask.sum())
            yield batch, tokens

    def _encoded(self, one: RowSet, expert: str) -> tuple[list[ImageRow], RowCounts]:
        rows = [ImageRow(self._pixels(row), self._text_of(row)) for row in one.rows]
        tokens = len(rows) * self.positions + sum(row.length for row in rows)
        return rows, RowCounts.of(one, rows, tokens)

    # ---- one row -----------------------------------------------------------------------------

    def _text_of(self, row: Row) -> list[int] | None:
        if self.text is None or row.target is None:
            return None
        # Positions of the text tower are learned: it takes no more.
        return self.text.tokens_of(row.target, row.where)[: self.text.context]

    def _pixels(self, row: Row) -> torch.Tensor:
        if row.kind == "pixel_values":
            pixels = torch.as_tensor(row.value).detach().to("cpu", torch.float32)
        elif self.processor is None:
            raise row.where.bad(
                "it is a picture, and the merged model has no image processor",
                "Add its preprocessor_config.json, or give `pixel_values`.",
            )
        else:
            made = self.processor(images=[_opened(row)], return_tensors="pt")
            pixels = made["pixel_values"][0].to(torch.float32)
        wanted, got = (self.channels, self.size, self.size), tuple(pixels.shape)
        if got != wanted:
            source = "pixel values" if row.kind == "pixel_values" else "the image processor's"
            raise row.where.bad(
                f"{source} should be of {wanted}, as the merged model takes them, got {got}",
                "Prepare the images with the merged model's own image processor.",
            )
        if not bool(torch.isfinite(pixels).all()):
            index = tuple((~torch.isfinite(pixels)).nonzero()[0].tolist())
            cause = f"pixel values are not finite: {pixels[index].item()} at index {list(index)}"
            raise row.where.bad(cause, "Correct the row.")
        return pixels


def _processor(folder: Path) -> Any:
    """The image processor of a model's folder; None where there is none."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EPMQInputError(
            "the merged model: its image processor cannot be loaded: "
            f"{reason.replace(str(folder), folder.name).rstrip('.')}.",
            code="EPMQ-F05",
            subject="the merged model",
            remedy="Correct its preprocessor_config.json, or take it out and give `pixel_values`.",
        ) from error


def _opened(row: Row) -> Any:
    from PIL import Image, UnidentifiedImageError

    value = row.value
    try:
        if isinstance(value, Mapping):
            stored = value["bytes"]
            value = Image.open(io.BytesIO(stored) if stored is not None else value["path"])
        elif isinstance(value, Path):
            value = Image.open(value)
        elif not isinstance(value, Image.Image):
            array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            value = Image.fromarray(array[..., 0] if array.shape[-1:] == (1,) else array)
        return value.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        name = f"`{value.name}` " if isinstance(value, Path) else ""
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "no picture"
        cause = f"{name}cannot be read as a picture: {reason}"
        raise row.where.bad(cause, "Correct the row.") from error
