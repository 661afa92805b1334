"""PIL images -> normalised tensors, with augmentation for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from pcenet.choices import Augment, did_you_mean

Transform = Callable[[Image.Image], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_IMAGE = 1.5  # "auto" shifts an image whose shorter side is up to this many times the input's


def train_transform(
    size: int,
    *,
    augment: Augment = "auto",
    horizontal_flip: bool = True,
    random_erasing: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    normalize: bool = True,
) -> Transform:
    """The transform of training images: PIL image -> float32 ``[3, size, size]``, normalised.

    All randomness comes from PyTorch's default generator.

    Args:
        size: side of the output in pixels.
        augment: ``"crop"``: the image is resized until its shorter side is ``size``, then shifted at random
            by up to ``size // 8`` pixels, its edge reflected. ``"resized_crop"``: 8-100 % of the area, of
            an aspect ratio from 3/4 to 4/3, is cut out at random and resized to ``size``. ``"auto"``: the
            former for an image whose shorter side is at most ``1.5 * size``, the latter for a larger one.
            ``"randaugment"``: ``"auto"`` followed by RandAugment (2 operations of magnitude 9). ``"none"``:
            ``eval_transform``.
        horizontal_flip: mirror half of the images (except under ``"none"``).
        random_erasing: share of the images in which a rectangle of 2-33 % of the area, of an aspect ratio from 0.3 to
            3.3, becomes the mean colour (Zhong et al., 2020), under any ``augment``.
        mean: mean of the R, G and B values (scale 0..1), subtracted.
        std: their standard deviation, divided by.
        normalize: False: uint8 all the same, for a GPU that applies `Normalize` itself; not with ``random_erasing``.

    Raises:
        ValueError: ``size`` is below 1, ``augment`` is unknown, ``random_erasing`` is not between 0 and 1, or above 0
            without ``normalize``, or ``mean`` or ``std`` is not three numbers.
    """
    if random_erasing and not normalize:
        raise ValueError(f"random_erasing {random_erasing} is of normalised images: leave out normalize=False.")
    if not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing must be between 0 and 1, not {random_erasing}.")
    erasing = [v2.RandomErasing(random_erasing)] if random_erasing else []
    if augment not in get_args(Augment):
        raise ValueError(
            f"augment must be one of {', '.join(get_args(Augment))}, not '{augment}'"
            f"{did_you_mean(augment, get_args(Augment))}"
        )
    if augment == "none":
        plain = eval_transform(size, mean=mean, std=std, normalize=normalize)
        return v2.Compose([plain, *erasing]) if erasing else plain
    _check_size(size)
    shift, zoom = _RandomShift(size), v2.RandomResizedCrop(size)
    geometry = {"crop": shift, "resized_crop": zoom}.get(augment, _BySize(int(SMALL_IMAGE * size), shift, zoom))
    transform: Transform = v2.Compose(
        [
            v2.PILToTensor(),
            geometry,
            *([v2.RandomHorizontalFlip()] if horizontal_flip else []),
            *([v2.RandAugment(num_ops=2, magnitude=9)] if augment == "randaugment" else []),
            *([Normalize(mean, std)] if normalize else []),
            *erasing,
        ]
    )
    return transform


def eval_transform(
    size: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    normalize: bool = True,
) -> Transform:
    """The transform of evaluation images: PIL image -> float32 ``[3, size, size]``, normalised.

    The image is resized (bilinear, antialiased) until its shorter side is ``size``; its centre is cut out.
    Arguments and errors as for ``train_transform``.
    """
    _check_size(size)
    last = [Normalize(mean, std)] if normalize else []
    transform: Transform = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size), *last])
    return transform


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be 1 or more (pixels), not {size}.")


class _RandomShift(nn.Module):
    """v2's ``Resize`` and ``RandomCrop`` with reflected padding, in a third of their time on small images."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        size, margin = self.size, self.size // 8
        if min(image.shape[-2:]) != size:
            image = v2.functional.resize(image, [size])
        padded = nn.functional.pad(image, (margin, margin, margin, margin), mode="reflect")
        top, left = (int(torch.randint(side - size + 1, ())) for side in padded.shape[-2:])
        return padded[..., top : top + size, left : left + size]


class _BySize(nn.Module):
    """``small`` for images whose shorter side is at most ``limit`` pixels, ``large`` for the others."""

    def __init__(self, limit: int, small: nn.Module, large: nn.Module) -> None:
        super().__init__()
        self.limit = limit
        self.small = small
        self.large = large

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = (self.small if min(image.shape[-2:]) <= self.limit else self.large)(image)
        return result


class Normalize(nn.Module):
    """uint8 -> ``(image / 255 - mean) / std`` in float32; one scale and one shift, a fifth of v2's time."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers each (R, G, B), std above 0, not mean={mean}, std={std}."
            )
        deviation = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("scale", (1 / (255 * deviation)).float(), persistent=False)
        shift = -torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) / deviation
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``[..., 3, H, W]`` in and out."""
        values = image.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self.scale).add_(self.shift)
