"""Rows of images → pixel values, by the merged model's own image processor, and their batches."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import EPMQInputError
from .row_checks import Row, bad_row
from .row_forms import IMAGES
from .row_sets import RowSet
from .tokens import EncodedCalibration, RowCounts, TokenRules, counted, encode_text

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
    def tokens(self) -> int:
        """Of its text; its patches are as many as every other image's."""
        return len(self.ids or ())


@dataclass(frozen=True)
class ImageRules:
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
        rows, counts = {}, {}
        for name, each in sets.items():
            parts = [self._encoded(one, name) for one in each]
            rows[name] = [row for part in parts for row in part]
            counts[name] = counted(
                RowCounts(
                    asked=one.source.samples,
                    available=one.available,
                    used=len(part),
                    sequences=len(part),
                    tokens=len(part) * self.positions + sum(row.tokens for row in part),
                    blank=one.blank,
                )
                for one, part in zip(each, parts, strict=True)
            )
        with_text = [row.ids is not None for each in rows.values() for row in each]
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
        return EncodedCalibration(rows, counts, self.form.name)

    def batches(
        self, rows: Sequence[ImageRow], batch_size: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Inputs of the model, and how many tokens of each batch are calibration."""
        for start in range(0, len(rows), batch_size):
            group = rows[start : start + batch_size]
            batch = {"pixel_values": torch.stack([row.pixels for row in group])}
            tokens = len(group) * self.positions
            if group[0].ids is not None:
                texts = pad_right([row.ids for row in group], self.text.pad_id)
                batch |= {"input_ids": texts.ids, "attention_mask": texts.mask}
                tokens += int(texts.mask.sum())
            yield batch, tokens

    # ---- one row -----------------------------------------------------------------------------

    def _encoded(self, one: RowSet, expert: str) -> list[ImageRow]:
        subject = f"expert `{expert}`"
        rows = []
        for row in one.rows:
            ids = None
            if self.text is not None and row.target is not None:
                ids = encode_text(row.target, row.place, self.text, expert)
                # Positions of the text tower are learned: it takes no more.
                ids = ids if self.text.context is None else ids[: self.text.context]
            rows.append(ImageRow(self._pixels(row, subject), ids))
        return rows

    def _pixels(self, row: Row, subject: str) -> torch.Tensor:
        if row.kind == "pixel_values":
            pixels = torch.as_tensor(row.value).detach().to("cpu", torch.float32)
        else:
            if self.processor is None:
                raise bad_row(
                    row.place,
                    "it is a picture, and the merged model has no image processor",
                    subject,
                    "Add its preprocessor_config.json, or give `pixel_values`.",
                )
            picture = _opened(row, subject)
            made = self.processor(images=[picture], return_tensors="pt")
            pixels = made["pixel_values"][0].to(torch.float32)
        wanted = (self.channels, self.size, self.size)
        if tuple(pixels.shape) != wanted:
            source = "pixel values" if row.kind == "pixel_values" else "the image processor's"
            raise bad_row(
                row.place,
                f"{source} should be of {wanted}, as the merged model takes them, got "
                f"{tuple(pixels.shape)}",
                subject,
                "Prepare the images with the merged model's own image processor.",
            )
        if not bool(torch.isfinite(pixels).all()):
            index = tuple((~torch.isfinite(pixels)).nonzero()[0].tolist())
            cause = f"pixel values are not finite: {pixels[index].item()} at index {list(index)}"
            raise bad_row(row.place, cause, subject, "Correct the row.")
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


def _opened(row: Row, subject: str) -> Any:
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
        raise bad_row(row.place, cause, subject, "Correct the row.") from error


class Padded(NamedTuple):
    """Rows of tokens filled up to one length: ``(B, S)`` ids (int64) and mask (bool)."""

    ids: torch.Tensor
    mask: torch.Tensor


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Rows of tokens as one batch; the mask hides what was filled up."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
    return Padded(ids, mask)
