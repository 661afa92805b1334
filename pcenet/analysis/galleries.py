"""The patches of which an expert is surest, each from another image."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional

from pcenet.analysis.observing import Box, Seen

SIDE = 88  # of a picture, in pixels
MARGIN = 0.5  # what is shown around a patch, in patch sides
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Exhibit:
    """A patch that an expert serves.

    Attributes:
        gate: the probability of its expert.
        image: number of its image.
        row: of the patch.
        column: of the patch.
        picture: the patch with what lies around it, `SIDE` pixels square, the patch itself framed.
    """

    gate: float
    image: int
    row: int
    column: int
    picture: Image.Image


class Gallery:
    """Streams the routings of one layer into the patches with each expert's highest gate values.

    Of an image an expert shows one patch, its surest; of equal gate values the one that came first. A patch that was
    dropped is not served, and not shown.

    Args:
        num_experts: E.
        size: exhibits of an expert, at most.
    """

    def __init__(self, num_experts: int, size: int) -> None:
        self.size = size
        self._heaps: list[list[tuple[float, int, Exhibit]]] = [[] for _ in range(num_experts)]

    def update(self, seen: Seen, pixels: Tensor, first: int) -> None:
        """Add one batch.

        Args:
            seen: what the layer saw.
            pixels: the batch, ``[B, 3, H, W]``, from 0 to 1.
            first: number of its first image.
        """
        routing = seen.routing
        cells = routing.grid.rows * routing.grid.columns
        gate = routing.probs.gather(1, routing.expert_ids[:, :1])[:, 0].float().view(-1, cells).cpu()
        choice = routing.expert_ids[:, 0].view(-1, cells).cpu()
        kept = routing.dispatch_mask[:, 0].view(-1, cells).cpu()
        for expert, heap in enumerate(self._heaps):
            of_expert = torch.where((choice == expert) & kept, gate, -1.0)
            # Not max, which promises no order among equal values.
            for index, values in enumerate(of_expert.tolist()):
                best = max(values)
                entry = (best, -(first + index))
                if best < 0 or (len(heap) == self.size and entry < heap[0][:2]):
                    continue
                row, column = divmod(values.index(best), routing.grid.columns)
                picture = framed(pixels[index], seen.box(row, column, (pixels.shape[2], pixels.shape[3])))
                exhibit = Exhibit(best, first + index, row, column, picture)
                (heapq.heappush if len(heap) < self.size else heapq.heappushpop)(heap, (*entry, exhibit))

    def of(self, expert: int) -> list[Exhibit]:
        """The exhibits of an expert, surest first."""
        return [exhibit for *_, exhibit in sorted(self._heaps[expert], key=lambda item: item[:2], reverse=True)]


def framed(pixels: Tensor, box: Box) -> Image.Image:
    """A patch with half a patch around it, `SIDE` pixels square; grey beyond the image.

    Args:
        pixels: the image, ``[3, H, W]``, from 0 to 1.
        box: left, top, right and bottom of the patch.
    """
    image = functional.to_pil_image(pixels.float().cpu())
    left, top, right, bottom = box
    middle = (left + right) / 2, (top + bottom) / 2
    half = (0.5 + MARGIN) * max(right - left, bottom - top)
    scale = SIDE / (2 * half)

    def place(x: float, y: float) -> tuple[int, int]:
        return round((x - middle[0] + half) * scale), round((y - middle[1] + half) * scale)

    picture = Image.new("RGB", (SIDE, SIDE), GREY)
    around = [max(0, middle[0] - half), max(0, middle[1] - half)]
    around += [min(image.width, middle[0] + half), min(image.height, middle[1] + half)]
    start, end = place(around[0], around[1]), place(around[2], around[3])
    size = (max(1, end[0] - start[0]), max(1, end[1] - start[1]))
    picture.paste(image.resize(size, Image.Resampling.BILINEAR, tuple(around)), start)
    draw = ImageDraw.Draw(picture)
    (x0, y0), (x1, y1) = place(left, top), place(right, bottom)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="white", width=1)
    draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline="black", width=1)
    return picture
