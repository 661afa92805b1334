"""The colours of classes, and a legend that names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain, product

from PIL import Image, ImageColor, ImageDraw, ImageFont

from pcenet.reporting.plots import PALETTE
from pcenet.texts import shown

MOST = 256  # colours of a palette
LEVELS = range(0, 256, 36)  # of red, green and blue, of the colours to choose from
ROW, MARGIN, TEXT = 28, 8, 16  # pixels

Colour = tuple[int, ...]


@cache
def class_colours() -> tuple[Colour, ...]:
    """Red, green and blue of `MOST` classes, 0 to 255.

    First those that colour-blind readers can tell apart, then always the one that lies farthest from all before it.
    """
    colours: list[Colour] = [ImageColor.getrgb(colour) for colour in PALETTE]
    candidates: list[Colour] = list(product(LEVELS, repeat=3))
    distances = [min(math.dist(candidate, colour) for colour in colours) for candidate in candidates]
    while len(colours) < MOST:
        farthest = candidates[distances.index(max(distances))]
        colours.append(farthest)
        distances = [min(old, math.dist(each, farthest)) for old, each in zip(distances, candidates, strict=True)]
    return tuple(colours)


def palette(count: int) -> list[int]:
    """The colours of ``count`` classes, as `PIL.Image.Image.putpalette` takes them."""
    return list(chain.from_iterable(class_colours()[:count]))


def legend(classes: Sequence[str]) -> Image.Image:
    """A picture with a row per class: its colour, its number and its name."""
    font = ImageFont.load_default(TEXT)
    texts = [f"{number}  {shown(name)}" for number, name in enumerate(classes)]
    width = 3 * MARGIN + ROW + round(max(font.getlength(text) for text in texts))
    picture = Image.new("RGB", (width, len(texts) * ROW + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        top = MARGIN + number * ROW
        draw.rectangle((MARGIN, top, MARGIN + ROW, top + ROW - MARGIN), fill=class_colours()[number], outline="black")
        draw.text((2 * MARGIN + ROW, top), text, fill="black", font=font)
    return picture
