"""What a network says of images and, on request, of their mirror images too (test-time augmentation)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pcenet.nn import Routing, record_routing


def answer(model: nn.Module, images: Tensor, *, tta: bool = False) -> tuple[Tensor, dict[str, list[Routing]]]:
    """Logits of a batch, float32, and what its routers decided of the images themselves, by layer.

    Args:
        model: gives logits ``[B, K]`` or, to segment, ``[B, K, H, W]``.
        images: ``[B, 3, H, W]``, normalised.
        tta: test-time augmentation: the probabilities are the mean of those of an image and of its mirror image (left
            to right), and the logits their logarithms.
    """
    with record_routing(model) as records:
        logits: Tensor = model(images).float()
    if tta:
        logits = mean_of(logits, model(images.flip(-1)).float())
    return logits, records


def mean_of(logits: Tensor, mirrored: Tensor) -> Tensor:
    """The logarithm of the mean of the probabilities, which is finite; those of mirrored pixels are mirrored back."""
    if mirrored.ndim == 4:
        mirrored = mirrored.flip(-1)
    return torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)
