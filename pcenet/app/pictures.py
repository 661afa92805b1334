"""Pictures for the page: an image under the colours of experts or classes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

from pcenet.analysis.samples import overlay
from pcenet.app.session import LayerRouting, Visit
from pcenet.reporting.colours import expert_colours

DROPPED = (128, 128, 128)
CHANGED = ImageColor.getrgb("#D55E00")
FAINTEST, STRONGEST = 0.15, 0.75  # opacity at gate value 0 and 1
SMALLEST_TEXT, LARGEST_TEXT = 11, 36  # pixels
NUMBERED = 18  # side in pixels from which a patch has its expert's number in it
DIM = 0.45  # of an image's brightness under what is marked in it


def opacity_of(gate: float) -> float:
    """How strongly an expert's colour covers a patch of this gate value."""
    return FAINTEST + (STRONGEST - FAINTEST) * gate


def expert_picture(visit: Visit) -> Image.Image:
    """The image in grey, each patch in its expert's colour, the stronger the higher its gate value.

    A number in a patch is its expert's; a patch that was sent elsewhere has a white frame, one that was dropped is
    grey.
    """
    routing, picture = visit.routing, visit.image.picture
    result = picture.convert("L").convert("RGB")
    for row, column in np.ndindex(*routing.grid):
        box = routing.box(row, column, picture.size)
        expert = int(routing.serving[row, column])
        colour = Image.new("RGB", (box.right - box.left, box.bottom - box.top), expert_colour(expert))
        under = result.crop(box)
        result.paste(Image.blend(under, colour, opacity_of(float(routing.gate[row, column]))), box)
    moved = {(place.row, place.column) for place in visit.moves if place.layer == visit.layer}
    _draw_marks(result, routing, moved)
    return result


def expert_colour(expert: int) -> tuple[int, ...]:
    """Red, green and blue of an expert; grey for -1, a patch that none served."""
    return DROPPED if expert < 0 else expert_colours()[expert % len(expert_colours())]


def _draw_marks(picture: Image.Image, routing: LayerRouting, moved: Collection[tuple[int, int]]) -> None:
    draw = ImageDraw.Draw(picture)
    first = routing.box(0, 0, picture.size)
    side = min(first.right - first.left, first.bottom - first.top)
    font = ImageFont.load_default(min(max(side // 3, SMALLEST_TEXT), LARGEST_TEXT))
    for row, column in np.ndindex(*routing.grid):
        left, top, right, bottom = routing.box(row, column, picture.size)
        expert = int(routing.serving[row, column])
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(40, 40, 40))
        if side >= NUMBERED:
            middle = ((left + right) / 2, (top + bottom) / 2)
            text = "-" if expert < 0 else str(expert)
            draw.text(middle, text, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    for patch in moved:
        left, top, right, bottom = routing.box(*patch, picture.size)
        for inset, colour in enumerate(("white", "white", "black")):
            if right - left > 2 * inset and bottom - top > 2 * inset:
                draw.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour)


def prediction_picture(visit: Visit) -> Image.Image:
    """What the visitor looks at of the prediction; of a class the image alone."""
    picture, before, after = visit.image.picture, visit.before.mask, visit.after.mask
    if before is None or after is None or visit.view == "image":
        return picture
    if visit.view == "change":
        return changed_picture(picture, before != after)
    masks = {"before": before, "after": after, "truth": visit.image.truth}
    mask = masks[visit.view]
    return class_picture(picture, mask) if isinstance(mask, np.ndarray) else picture


def class_picture(picture: Image.Image, mask: npt.NDArray[np.uint8]) -> Image.Image:
    """The image under the colours of its pixels' classes."""
    return overlay(picture, Image.fromarray(mask))


def changed_picture(picture: Image.Image, changed: npt.NDArray[np.bool_]) -> Image.Image:
    """The image in dim grey, the pixels whose class changed in one bright colour, and those beside them."""
    grey = picture.convert("L").point([round(value * DIM) for value in range(256)]).convert("RGB")
    marks = Image.fromarray(changed).convert("L").filter(ImageFilter.MaxFilter(3))  # single pixels would be overlooked
    return Image.composite(Image.new("RGB", picture.size, CHANGED), grey, marks)
