"""Counting the pixels that a segmentation network gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.data import IGNORE
from pcenet.nn.processes import sum_over_processes
from pcenet.runtime.device import widest

ROOM = 2**27  # numbers, half a gigabyte: what may be made of an image's logits at its full size at once

PixelBatches = Sequence[tuple[Tensor, Sequence[Tensor]]]
"""Batches of images of one size each, ``[b, 3, h, w]``, with their masks, ``[H_i, W_i]`` each at its own size."""


@dataclass(frozen=True)
class PixelCounts:
    """What `PixelScores` has seen.

    Attributes:
        confusion: ``[K, K]`` int64, pixels of class i predicted as class j.
        loss: mean cross-entropy of a pixel that counts.
    """

    confusion: Tensor
    loss: float

    @property
    def iou(self) -> Tensor:
        """``[K]``: intersection over union of each class; NaN for one that neither occurs nor is predicted."""
        hits = self.confusion.diagonal()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that occur or are predicted; 0 where no pixel counts."""
        return float(self.iou.nanmean().nan_to_num())

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels that were right; 0 where no pixel counts."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum().clamp(min=1))


class PixelScores:
    """Streams logits and masks into `PixelCounts`; only counts are kept, and they stay on the device.

    Args:
        num_classes: K.
        device: where to count.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False).to(device)
        self._loss = torch.zeros((), dtype=widest(device), device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, masks: Sequence[Tensor]) -> None:
        """Add a batch; each image's logits are enlarged bilinearly to the size of its mask.

        Args:
            logits: ``[b, K, h, w]``.
            masks: b class numbers ``[H_i, W_i]``.
        """
        for image, mask in zip(logits, masks, strict=True):
            mask = mask.to(image.device)
            enlarged = upsample(image, (mask.shape[0], mask.shape[1]))
            self._confusion.update(enlarged.argmax(0), mask)
            self._loss += F.cross_entropy(enlarged[None], mask[None], ignore_index=IGNORE, reduction="sum")

    def compute(self) -> PixelCounts:
        """Everything seen so far, by all processes."""
        confusion = self._confusion.compute()  # torchmetrics sums over processes by itself
        return PixelCounts(confusion, float(sum_over_processes(self._loss) / confusion.sum().clamp(min=1)))


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits ``[K, h, w]`` of one image, float32, bilinearly at another size ``[K, H, W]``."""
    return F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]


def classes_at(logits: Tensor, size: tuple[int, int], room: int = ROOM) -> Tensor:
    """The class of each pixel of one image at another size: the argmax of `upsample`, ``[H, W]`` uint8.

    Args:
        logits: ``[K, h, w]``, K at most 255.
        size: H and W.
        room: so many numbers are made at once, if one class has no more: a large image would take gigabytes.
    """
    step = max(1, room // (size[0] * size[1]))
    numbers = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    best: Tensor | None = None
    for first in range(0, len(logits), step):
        enlarged = upsample(logits[first : first + step], size)
        values = enlarged.amax(0)
        found = (enlarged.argmax(0) + first).to(torch.uint8)
        numbers = found if best is None else torch.where(values > best, found, numbers)
        best = values if best is None else torch.maximum(values, best)
    return numbers
