"""What a network asks for, what it costs and how its routers fare, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm.data
from torch import nn

from pcenet.models import complexity

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


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the images that a model is made for."""
    _, height, width = preprocessing(model)["input_size"]
    return int(height), int(width)


def image_side(model: nn.Module) -> int:
    """Side in pixels of the square images that a classifier is made for."""
    return image_size(model)[1]


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Input size, mean and standard deviation that a timm model's ``pretrained_cfg`` asks for.

    Raises:
        ValueError: if it takes other images than those of three channels, which all images are read as.
    """
    resolved: dict[str, Any] = timm.data.resolve_model_data_config(model)
    found = {"in_chans": getattr(model, "model_args", {}).get("in_chans", 3)}
    found |= {name: len(resolved[name]) for name in ("mean", "std")}
    for name, channels in found.items():
        if channels != 3 and (name == "in_chans" or channels != 1):
            raise ValueError(
                f"{name} of the network is for {channels} channels; images are read as RGB, which has three"
            )
    return resolved


def cost_of(model: nn.Module) -> dict[str, Any]:
    """What one image of the model's own size costs: `pcenet.models.Complexity` as JSON can hold it."""
    cost = complexity(model, (3, *image_size(model)))
    return asdict(cost) | {"router_share": cost.router_share, "routed_share": cost.routed_share}


def score_digits(images: int) -> int:
    """Decimals of a percentage that so many images support: no finer than one image of them, and 2 at most."""
    return 0 if images <= 100 else 1 if images <= 1000 else 2
