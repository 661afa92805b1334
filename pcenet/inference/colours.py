"""The colours of classes, and a legend that names them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from itertools import chain

from PIL import Image, ImageColor, ImageDraw, ImageFont

from pcenet.analysis.pictures import PALETTE

GOLDEN = 0.618034  # of the circle of hues from one class to the next: any number of them lie far apart
ROW, MARGIN, TEXT = 28, 8, 16  # pixels

Colour = tuple[int, ...]


def class_colour(number: int) -> Colour:
    """Red, green and blue of a class, 0 to 255; the first ones are those that colour-blind readers can tell apart."""
    if number < len(PALETTE):
        return ImageColor.getrgb(PALETTE[number])
    hue, value = number * GOLDEN % 1, 0.95 - 0.3 * (number % 3) / 2
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.6, value))


def palette(count: int) -> list[int]:
    """The colours of ``count`` classes, as `PIL.Image.Image.putpalette` takes them."""
    return list(chain.from_iterable(class_colour(number) for number in range(count)))


def legend(classes: Sequence[str]) -> Image.Image:
    """A picture with a row per class: its colour, its number and its name."""
    font = ImageFont.load_default(TEXT)
    texts = [f"{number}  {name}" for number, name in enumerate(classes)]
    width = 3 * MARGIN + ROW + round(max(font.getlength(text) for text in texts))
    picture = Image.new("RGB", (width, len(texts) * ROW + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        top = MARGIN + number * ROW
        draw.rectangle((MARGIN, top, MARGIN + ROW, top + ROW - MARGIN), fill=class_colour(number), outline="black")
        draw.text((2 * MARGIN + ROW, top), text, fill="black", font=font)
    return picture
