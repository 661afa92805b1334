"""What is measured of a trained network, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOP_K = 5
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one split.

    Attributes:
        images: how many images.
        loss: mean cross-entropy, without label smoothing.
        top1: share of the images whose class has the highest logit.
        top5: share whose class is among the five highest; None for fewer than five classes.
        calibration_error: expected calibration error, 15 bins, L1 (Guo et al., 2017).
        per_class: class name to its number of images and its accuracy (None without images).
        confusion: ``confusion[i][j]`` images of class i predicted as class j, in the order of `per_class`.
        router: layer name to its health on these images; empty for dense networks.
    """

    images: int
    loss: float
    top1: float
    top5: float | None
    calibration_error: float
    per_class: dict[str, dict[str, Any]]
    confusion: list[list[int]]
    router: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PixelEvaluation:
    """What was measured on one split for segmentation, every image at the size of its mask.

    Attributes:
        images: how many images.
        pixels: how many pixels, those ignored aside.
        loss: mean cross-entropy of a pixel.
        miou: mean of the classes' intersections over unions; classes that neither occur nor are predicted aside.
        pixel_accuracy: share of the pixels whose class has the highest logit.
        per_class: class name to its share of the pixels, its IoU (None where it neither occurs nor is predicted) and
            its accuracy (None where it does not occur).
        confusion: ``confusion[i][j]`` pixels of class i predicted as class j, in the order of `per_class`.
        router: layer name to its health on these images; empty for dense networks.
    """

    images: int
    pixels: int
    loss: float
    miou: float
    pixel_accuracy: float
    per_class: dict[str, dict[str, Any]]
    confusion: list[list[int]]
    router: dict[str, dict[str, Any]]
