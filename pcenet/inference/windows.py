"""Large images in overlapping windows of the network's own size, none of their detail given up to make them smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from pcenet.data import Normalize, Transform
from pcenet.exporting.files import ExportedNet
from pcenet.inference.network import Network
from pcenet.models import SavableModel
from pcenet.models.preprocessing import image_size, preprocessing
from pcenet.tasks import get_task

DEVIATIONS = 8  # a window's side in standard deviations of its weights, as in nnU-Net and MONAI


class SlidingWindow:
    """Finds the class of each pixel of a large image, window by window; only a band of windows is in memory.

    Where windows overlap, their probabilities are averaged with Gaussian weights: a pixel counts less towards the edge
    of a window, where the network sees less of what is around it.

    Args:
        network: gives logits ``[B, len(network.classes), h, w]`` of windows.
        overlap: the share of a window's side that it has at least in common with the next, below 1.
        batch_size: windows per step.

    Raises:
        ValueError: for a network that does not segment.
    """

    def __init__(self, network: Network, overlap: float, batch_size: int) -> None:
        if network.model.task != "segment":
            raise ValueError("sliding_window is for networks that segment; this one gives a whole image one label")
        values = preprocessing(network.model)
        self.network, self.overlap, self.batch_size = replace(network, routing=False), overlap, batch_size
        self.size = image_size(network.model)
        self.normalize = Normalize(values["mean"], values["std"])
        rows, columns = map(gaussian, self.size)
        self.weights = (rows[:, None] * columns).to(network.device)

    def __call__(self, image: Image.Image) -> Tensor:
        """The class of each pixel, ``[H, W]`` uint8 on the processor, of an image that is no smaller than a window."""
        (height, width), columns = self.size, starts(image.width, self.size[1], self.overlap)
        classes = torch.empty((image.height, image.width), dtype=torch.uint8)
        band = self.weights.new_zeros((len(self.network.classes), height, image.width))
        above = 0  # the row of the image that is the band's first
        for top in starts(image.height, height, self.overlap):
            done = top - above  # rows that no further window reaches
            classes[above:top] = band[:, :done].argmax(0)
            band = torch.cat([band[:, done:], torch.zeros_like(band[:, :done])], 1)
            above = top
            for first in range(0, len(columns), self.batch_size):
                lefts = columns[first : first + self.batch_size]
                windows = [image.crop((left, top, left + width, top + height)) for left in lefts]
                logits, _ = self.network(
                    self.normalize(torch.stack([functional.pil_to_tensor(each) for each in windows]))
                )
                for left, scores in zip(lefts, logits.softmax(1), strict=True):
                    band[:, :, left : left + width] += scores * self.weights
        classes[above:] = band.argmax(0)
        return classes


def image_transform(model: SavableModel | ExportedNet, windows: SlidingWindow | None) -> Transform:
    """What prepares a network's images; with windows see `OnlySmall`."""
    transform = get_task(model.task).image_transform(model)
    return transform if windows is None else OnlySmall(windows.size, transform)


@dataclass(frozen=True)
class OnlySmall:
    """Prepares an image that is smaller than a window in a direction, as without windows. For any other it gives
    nothing, ``[0]``: it is cut into windows when it is its turn, and does not wait in memory.

    Attributes:
        size: height and width of a window.
        transform: what prepares the small ones.
    """

    size: tuple[int, int]
    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        """The prepared image ``[3, h, w]``, or ``[0]``."""
        large = image.height >= self.size[0] and image.width >= self.size[1]
        return torch.empty(0) if large else self.transform(image)


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Where windows begin that cover a length with at least this overlap: as few as that takes, evenly spread."""
    step = max(1, math.floor(side * (1 - overlap) + 1e-9))
    gaps = math.ceil((length - side) / step)
    return [number * (length - side) // max(gaps, 1) for number in range(gaps + 1)]


def gaussian(side: int) -> Tensor:
    """The weights along one side of a window, ``[side]``, 1 in its middle."""
    distance = torch.arange(side) - (side - 1) / 2
    return torch.exp(-0.5 * (distance * DEVIATIONS / side) ** 2)
