"""Images with the experts of their patches laid over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional

from pcenet.analysis import Seen
from pcenet.analysis.galleries import SIDE, Exhibit
from pcenet.reporting.colours import expert_colours, palette

WIDTH = 400  # pixels of an overlay
FAINTEST, STRONGEST = 0.15, 0.75  # opacity of the colours at gate values 0 and 1
LIGHT = 0.7  # of the darkness of the image below is left
NUMBERED = 22  # pixels of a patch from which its expert's number is written into it
COLUMNS, GAP = 6, 4  # exhibits in a row of a gallery, pixels between them
DROPPED = (60, 60, 60)


def picture_of(pixels: Tensor) -> Image.Image:
    """An image ``[3, H, W]`` with values from 0 to 1, `WIDTH` pixels wide; small ones keep their hard pixels."""
    image = functional.to_pil_image(pixels.float().cpu())
    height = max(1, round(image.height * WIDTH / image.width))
    soft = image.width > WIDTH / 4
    return image.resize((WIDTH, height), Image.Resampling.BILINEAR if soft else Image.Resampling.NEAREST)


def expert_overlay(pixels: Tensor, seen: Seen, image: int) -> Image.Image:
    """The experts of an image's patches: colour and number say which, opacity its gate value, a cross what is dropped.

    Args:
        pixels: the image, ``[3, H, W]``, from 0 to 1.
        seen: what the layer saw of the batch that holds it.
        image: its number in that batch.
    """
    # Lightened, because colours cannot be told apart on black.
    grey = picture_of(pixels).convert("L").point([round(255 - LIGHT * (255 - v)) for v in range(256)]).convert("RGB")
    routing = seen.routing
    _, rows, columns = routing.grid
    gate = routing.probs.gather(1, routing.expert_ids[:, :1])[:, 0].view(*routing.grid)[image].tolist()
    experts = routing.expert_ids[:, 0].view(*routing.grid)[image].tolist()
    kept = routing.dispatch_mask[:, 0].view(*routing.grid)[image].tolist()
    colours = Image.new("RGB", grey.size)
    opacity = Image.new("L", grey.size)
    colour_draw, opacity_draw = ImageDraw.Draw(colours), ImageDraw.Draw(opacity)
    boxes = {}
    for row in range(rows):
        for column in range(columns):
            box = _whole(seen.box(row, column, (grey.height, grey.width)))
            boxes[row, column] = box
            served = kept[row][column]
            colour_draw.rectangle(box, expert_colours()[experts[row][column]] if served else DROPPED)
            strength = FAINTEST + (STRONGEST - FAINTEST) * gate[row][column] if served else STRONGEST
            opacity_draw.rectangle(box, round(255 * strength))
    result = Image.composite(colours, grey, opacity)
    draw = ImageDraw.Draw(result)
    for (row, column), box in boxes.items():
        left, top, right, bottom = box
        draw.rectangle(box, outline="white")
        if not kept[row][column]:
            draw.line((left, top, right, bottom), "white", 2)
            draw.line((left, bottom, right, top), "white", 2)
        elif min(right - left, bottom - top) >= NUMBERED:
            _number(draw, (left + 3, top + 2), experts[row][column])
    return result


def class_overlay(pixels: Tensor, classes: Tensor, opacity: float = 0.6) -> Image.Image:
    """An image under the colours of its pixels' classes ``[H, W]``; classes of 255 leave it as it is."""
    image = picture_of(pixels)
    numbers = Image.fromarray(classes.to(torch.uint8).cpu().numpy())
    mask = numbers.resize(image.size, Image.Resampling.NEAREST)
    counts = mask.point([255] * 255 + [0])
    mask.putpalette(palette(range(255)))
    return Image.composite(Image.blend(image, mask.convert("RGB"), opacity), image, counts)


def gallery_sheet(exhibits: Sequence[Exhibit]) -> Image.Image:
    """The pictures of an expert's gallery, row by row."""
    columns = min(COLUMNS, len(exhibits))
    rows = -(-len(exhibits) // columns)
    step = SIDE + GAP
    sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), "white")
    for number, exhibit in enumerate(exhibits):
        row, column = divmod(number, columns)
        sheet.paste(exhibit.picture, (column * step, row * step))
    return sheet


def _whole(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(side) for side in box)
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _number(draw: ImageDraw.ImageDraw, place: tuple[int, int], number: int) -> None:
    font = ImageFont.load_default(15)
    draw.text(place, str(number), fill="white", font=font, stroke_width=2, stroke_fill="black")
