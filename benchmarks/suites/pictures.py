"""The images of the vision suite: seven tasks that are drawn, and scikit-learn's digits.

A picture shows more than its task asks for: its colours, sizes and places are drawn at random, so
an expert of one task learns to look away from what another's task is about. No two splits share a
picture: each comes from a generator of its own, and a digit of the data set belongs to one split.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from epmq_gptq.errors import EPMQInputError

SIZE = 32
_LETTERS = "ABCDEFGHKR"
_SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
_HUES = 8
_ANGLES = 8
_MOST_DOTS = 6
_TEXTURES = ("checks", "dots", "rings", "noise", "gradient", "waves")

# Task → how many classes it has.
CLASSES = {
    "digits": 10,
    "letters": len(_LETTERS),
    "shapes": len(_SHAPES),
    "colours": _HUES,
    "counting": _MOST_DOTS,
    "places": 9,
    "stripes": _ANGLES,
    "textures": len(_TEXTURES),
}
# Shares of the digits: there are 1,797.
_DIGIT_SHARES = {"train": 0.5, "calibration": 0.2, "held_out": 0.1, "evaluation": 0.2}


def pictures(task: str, split: str, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """Endless ``(SIZE, SIZE, 3)`` uint8 pictures of a task with their classes."""
    rng = np.random.default_rng([zlib.crc32(f"{task}:{split}".encode()), seed])
    draw = _DRAWN.get(task)
    while True:
        label = int(rng.integers(CLASSES[task]))
        image = _digit(rng, label, split) if draw is None else draw(rng, label)
        yield _noisy(rng, image), label


# ---- colours -------------------------------------------------------------------------------------


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _pair(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Background and foreground of any hue, one dark and one bright."""
    dark = _colour(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.05, 0.35))
    bright = _colour(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.65, 1))
    return (dark, bright) if rng.random() < 0.5 else (bright, dark)


def _noisy(rng: np.random.Generator, image: np.ndarray | Image.Image) -> np.ndarray:
    values = np.asarray(image, dtype=np.float32)
    values = values + rng.normal(0, 12, values.shape)
    return values.clip(0, 255).astype(np.uint8)


def _canvas(colour: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), colour)
    return image, ImageDraw.Draw(image)


# ---- what is real ------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digit_images() -> dict[tuple[str, int], np.ndarray]:
    """(split, digit) → ``(n, 8, 8)`` intensities in 0 to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EPMQInputError(
            "the suite `vision8` takes its digits from scikit-learn, which is not installed.",
            code="EPMQ-O03",
            subject="`vision8`",
            remedy="Install it: pip install 'epmq-gptq[suites]'.",
        ) from error
    digits = load_digits()
    found = {}
    for digit in range(10):
        own = digits.images[digits.target == digit]
        own = own[np.random.default_rng(digit).permutation(len(own))]
        start = 0
        for split, share in _DIGIT_SHARES.items():
            stop = start + round(share * len(own))
            found[split, digit] = own[start:stop]
            start = stop
    return found


def _digit(rng: np.random.Generator, label: int, split: str) -> np.ndarray:
    images = _digit_images()[split, label]
    small = Image.fromarray((images[rng.integers(len(images))] * 15).astype(np.uint8))
    size = int(rng.integers(24, 31))
    mask = Image.new("L", (SIZE, SIZE))
    place = rng.integers(0, SIZE - size + 1, 2)
    mask.paste(small.resize((size, size), Image.Resampling.BILINEAR), tuple(map(int, place)))
    back, front = _pair(rng)
    return np.asarray(Image.composite(Image.new("RGB", mask.size, front),
                                      Image.new("RGB", mask.size, back), mask))  # fmt: skip


# ---- what is drawn -----------------------------------------------------------------------------


def _letter(rng: np.random.Generator, label: int) -> Image.Image:
    back, front = _pair(rng)
    image, draw = _canvas(back)
    place = tuple(rng.uniform(13, SIZE - 13, 2))
    font = ImageFont.load_default(float(rng.uniform(20, 28)))
    draw.text(place, _LETTERS[label], fill=front, font=font, anchor="mm")
    return image


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius ``r``."""
    if shape == "triangle":
        corners = (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)
    elif shape == "diamond":
        corners = (0, math.pi / 2, math.pi, 3 * math.pi / 2)
    else:
        corners = tuple(math.pi / 4 + i * math.pi / 2 for i in range(4))
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in corners]


def _stamp(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]
) -> None:
    box = [x - r, y - r, x + r, y + r]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(r / 3)))
    elif shape == "cross":
        arm = r / 3
        draw.rectangle([x - arm, y - r, x + arm, y + r], fill=fill)
        draw.rectangle([x - r, y - arm, x + r, y + arm], fill=fill)
    else:
        draw.polygon(_outline(shape, x, y, r), fill=fill)


def _shape(rng: np.random.Generator, label: int) -> Image.Image:
    back, front = _pair(rng)
    image, draw = _canvas(back)
    r = rng.uniform(6, 11)
    x, y = rng.uniform(r, SIZE - r, 2)
    _stamp(draw, _SHAPES[label], x, y, r, front)
    return image


def _hue(rng: np.random.Generator, label: int) -> Image.Image:
    """The hue of whichever shape there is, on grey."""
    grey = int(rng.integers(20, 236))
    image, draw = _canvas((grey, grey, grey))
    hue = (label + rng.uniform(-0.3, 0.3)) / _HUES
    r = rng.uniform(5, 11)
    x, y = rng.uniform(r, SIZE - r, 2)
    fill = _colour(hue, rng.uniform(0.5, 1), rng.uniform(0.5, 1))
    _stamp(draw, _SHAPES[rng.integers(len(_SHAPES))], x, y, r, fill)
    return image


def _dots(rng: np.random.Generator, label: int) -> Image.Image:
    back, front = _pair(rng)
    image, draw = _canvas(back)
    cells = rng.permutation(9)[: label + 1]
    shape = _SHAPES[rng.integers(len(_SHAPES))]
    for cell in cells:
        x, y = (5.5 + 10.5 * part + rng.uniform(-1.5, 1.5) for part in divmod(int(cell), 3))
        _stamp(draw, shape, x, y, rng.uniform(2.5, 4), front)
    return image


def _place(rng: np.random.Generator, label: int) -> Image.Image:
    """Which ninth of the picture holds the large shape; small ones are anywhere."""
    back, front = _pair(rng)
    image, draw = _canvas(back)
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.uniform(2, SIZE - 2, 2)
        _stamp(draw, _SHAPES[rng.integers(len(_SHAPES))], x, y, rng.uniform(1, 2), front)
    row, column = divmod(label, 3)
    x, y = (5.5 + 10.5 * part + rng.uniform(-2, 2) for part in (column, row))
    _stamp(draw, _SHAPES[rng.integers(len(_SHAPES))], x, y, rng.uniform(4, 6), front)
    return image


def _blend(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """``(SIZE, SIZE)`` in 0 to 1 as a picture of two colours."""
    back, front = (np.asarray(each, dtype=np.float32) for each in _pair(rng))
    return back + share[..., None] * (front - back)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    return np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _stripes(rng: np.random.Generator, label: int) -> np.ndarray:
    y, x = _grid()
    angle = math.pi * (label + rng.uniform(-0.25, 0.25)) / _ANGLES
    along = x * math.cos(angle) + y * math.sin(angle)
    wave = np.sin(2 * math.pi * along / rng.uniform(5, 11) + rng.uniform(0, 2 * math.pi))
    return _blend(rng, 0.5 + 0.5 * wave)


def _texture(rng: np.random.Generator, label: int) -> np.ndarray:
    y, x = _grid()
    step = rng.uniform(5, 10)
    shift = rng.uniform(0, step, 2)
    kind = _TEXTURES[label]
    if kind == "checks":
        share = ((x + shift[0]) // step + (y + shift[1]) // step) % 2
    elif kind == "dots":
        dx, dy = ((x + shift[0]) % step - step / 2), ((y + shift[1]) % step - step / 2)
        share = (dx**2 + dy**2 < (0.3 * step) ** 2).astype(np.float32)
    elif kind == "rings":
        cx, cy = rng.uniform(8, SIZE - 8, 2)
        share = 0.5 + 0.5 * np.sin(2 * math.pi * np.hypot(x - cx, y - cy) / step)
    elif kind == "noise":
        coarse = rng.random((int(SIZE // 2), int(SIZE // 2)))
        share = coarse.repeat(2, 0).repeat(2, 1)
    else:
        angle = rng.uniform(0, 2 * math.pi)
        along = x * math.cos(angle) + y * math.sin(angle)
        if kind == "gradient":
            share = (along - along.min()) / np.ptp(along)
        else:
            across = y * math.cos(angle) - x * math.sin(angle)
            share = 0.5 + 0.5 * np.sin(2 * math.pi * (along + 3 * np.sin(across / 3)) / step)
    return _blend(rng, share)


_DRAWN: dict[str, Callable[[np.random.Generator, int], np.ndarray | Image.Image]] = {
    "letters": _letter,
    "shapes": _shape,
    "colours": _hue,
    "counting": _dots,
    "places": _place,
    "stripes": _stripes,
    "textures": _texture,
}
