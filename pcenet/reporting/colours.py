"""The colours of classes and of experts, which nobody should take for each other, and a legend of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain, product

from PIL import Image, ImageColor, ImageDraw, ImageFont

from pcenet.texts import shown

MOST = 256  # colours of a palette
LEVELS = range(0, 256, 36)  # of red, green and blue, of the colours to choose from
ROW, MARGIN, TEXT = 28, 8, 16  # pixels

# Okabe and Ito's palette, which colour-blind readers can tell apart; of lines, and of the first classes.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
# Of the first experts; a third of red, green or blue apart from each other and from the first dozen classes.
EXPERTS = ("#B4E600", "#332288", "#FF6F61", "#00E5CF", "#9B5DE5", "#7A4B16", "#F2DCA6")

Colour = tuple[int, ...]


@cache
def class_colours() -> tuple[Colour, ...]:
    """Red, green and blue of `MOST` classes, 0 to 255.

    First those that colour-blind readers can tell apart, then always the one that lies farthest from all before it.
    """
    return _and_farthest(PALETTE)


@cache
def expert_colours() -> tuple[Colour, ...]:
    """Likewise of `MOST` experts; the first are no class's."""
    return _and_farthest(EXPERTS)


def _and_farthest(first: Sequence[str]) -> tuple[Colour, ...]:
    colours: list[Colour] = [ImageColor.getrgb(colour) for colour in first]
    candidates: list[Colour] = list(product(LEVELS, repeat=3))
    distances = [min(math.dist(candidate, colour) for colour in colours) for candidate in candidates]
    while len(colours) < MOST:
        farthest = candidates[distances.index(max(distances))]
        colours.append(farthest)
        distances = [min(old, math.dist(each, farthest)) for old, each in zip(distances, candidates, strict=True)]
    return tuple(colours)


def css(colour: Colour) -> str:
    """A colour as CSS and matplotlib have it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def palette(values: Sequence[int]) -> list[int]:
    """The colours of classes whose pixels have these values, as `PIL.Image.Image.putpalette` takes them."""
    colours: list[tuple[int, ...]] = [(0, 0, 0)] * (max(values) + 1)
    for value, colour in zip(values, class_colours(), strict=False):
        colours[value] = colour
    return list(chain.from_iterable(colours))


def legend(classes: Sequence[str], values: Sequence[int]) -> Image.Image:
    """A picture with a row per class: its colour, its value in masks and its name."""
    font = ImageFont.load_default(TEXT)
    texts = [f"{value}  {shown(name)}" for value, name in zip(values, classes, strict=True)]
    width = 3 * MARGIN + ROW + round(max(font.getlength(text) for text in texts))
    picture = Image.new("RGB", (width, len(texts) * ROW + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        top = MARGIN + number * ROW
        draw.rectangle((MARGIN, top, MARGIN + ROW, top + ROW - MARGIN), fill=class_colours()[number], outline="black")
        draw.text((2 * MARGIN + ROW, top), text, fill="black", font=font)
    return picture
