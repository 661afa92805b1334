"""Whether a patch keeps its expert when its image is changed in a way that leaves every patch in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pcenet.analysis.observing import Seen

BRIGHTNESS, SATURATION = 1.25, 0.6  # factors of the change of colours


@dataclass(frozen=True)
class View:
    """A change of images under which patches keep their place, or swap places as a mirror has it.

    Attributes:
        name: what to call it.
        change: images ``[B, 3, H, W]`` with values from 0 to 1, to others.
        mirrored: whether left and right are exchanged.
    """

    name: str
    change: Callable[[Tensor], Tensor]
    mirrored: bool = False


def recolour(pixels: Tensor) -> Tensor:
    """Images brighter by a quarter and paler by two fifths; nothing moves."""
    return functional.adjust_saturation(functional.adjust_brightness(pixels, BRIGHTNESS), SATURATION)


def mirror(pixels: Tensor) -> Tensor:
    """Images with left and right exchanged."""
    return pixels.flip(-1)


VIEWS = (View("other colours", recolour), View("mirrored", mirror, mirrored=True))


@dataclass(frozen=True)
class Pixels:
    """Between a network's inputs and the pixels behind them.

    Attributes:
        mean: of the R, G and B values (scale 0 to 1), subtracted.
        std: their standard deviation, divided by.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def of(self, inputs: Tensor) -> Tensor:
        """Inputs ``[B, 3, H, W]`` as values from 0 to 1."""
        mean, std = self._columns(inputs)
        return (inputs * std + mean).clamp(0, 1)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Values from 0 to 1 as the network wants them."""
        mean, std = self._columns(pixels)
        return (pixels - mean) / std

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in (self.mean, self.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)


@dataclass(frozen=True)
class Agreement:
    """How often two routings of the same patches agree.

    Attributes:
        rate: share of the patches whose first choice is the same in both.
        chance: the share that two independent routings of these loads would agree on.
    """

    rate: float
    chance: float


class AgreementStatistics:
    """Streams pairs of routings of one layer into an `Agreement`; only counts ``[E, E]`` are kept.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self._counts = np.zeros((num_experts, num_experts), np.int64)

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add patches.

        Args:
            first: experts, int64, of whatever shape.
            second: experts of the same patches, in the same order.
        """
        np.add.at(self._counts, (first.cpu().numpy(), second.cpu().numpy()), 1)

    def compute(self) -> Agreement:
        """The agreement of everything seen so far.

        Raises:
            ValueError: if nothing was.
        """
        total = self._counts.sum()
        if not total:
            raise ValueError("no patch was compared: call update first")
        joint = self._counts / total
        return Agreement(float(np.trace(joint)), float(joint.sum(0) @ joint.sum(1)))


def first_choices(seen: Seen, view: View | None = None) -> Tensor | None:
    """The expert of each patch ``[images, rows, columns]``, of a view at the place that the patch has in the image.

    None for a mirrored view whose patches do not divide the map: padding lies on one side, so no patch has a place in
    both.

    Args:
        seen: what a layer saw.
        view: what was shown to the network; None: the images as they are.
    """
    choices = seen.routing.expert_ids[:, 0].view(*seen.routing.grid)
    if view is None or not view.mirrored:
        return choices
    return choices.flip(-1) if seen.divides else None
