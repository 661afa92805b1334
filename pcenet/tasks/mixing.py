"""Mixing the images of a batch: mixup and cutmix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mixing(mixup: float, cutmix: float) -> Mixing | None:
    """Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) as torchvision has them; None for neither.

    Each image meets the one before it in the batch, all of a batch by the same share. All chance comes from torch's
    default generator.

    Args:
        mixup: a of the shares' distribution Beta(a, a); 0 is no mixup.
        cutmix: the same for cutmix; with both, each batch gets one of them, by even odds.

    Returns:
        A function from images ``[B, 3, H, W]`` and targets ``[B, classes]`` (rows that sum to 1) to mixed ones.
    """
    transforms = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not transforms:
        return None
    mixing: Mixing = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)
    return mixing


def make_pasting(cutmix: float) -> Mixing | None:
    """Cutmix for images with masks: a rectangle of the image before in the batch, and of its mask, at the same place.

    What lies where in a scene stays as it is: the sky of one image is pasted where the other has its own.

    Args:
        cutmix: a of Beta(a, a), from which the share of the area is drawn; 0 is no cutmix.

    Returns:
        A function from images ``[B, 3, H, W]`` and masks ``[B, H, W]`` int64 to mixed ones; None for no cutmix.
    """
    if not cutmix:
        return None
    paste = v2.CutMix(alpha=cutmix, num_classes=1)  # it wants labels, and gives back shares of one class

    def mix(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        layers = torch.cat((images, masks[:, None].to(images.dtype)), dim=1)  # class numbers are exact in any float
        pasted, _ = paste(layers, torch.zeros(len(images), dtype=torch.int64, device=images.device))
        return pasted[:, :-1], pasted[:, -1].to(masks.dtype)

    return mix
