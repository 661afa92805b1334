"""Mixing the images of a batch: mixup and cutmix."""

from __future__ import annotations

from collections.abc import Callable

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
