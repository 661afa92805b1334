"""PIL images and their masks -> normalised tensors and class numbers, in one geometry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pcenet.data.base import IGNORE
from pcenet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize, Transform

JointTransform = Callable[[Image.Image, Image.Image], tuple[Tensor, Tensor]]


def segment_train_transform(
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    jitter: float = 0.4,
    horizontal_flip: bool = True,
    centre: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> JointTransform:
    """The transform of training: PIL image and mask -> float32 ``[3, h, w]``, normalised, and int64 ``[h, w]``.

    Image and mask are resized by one factor (the image bilinear and antialiased, the mask to the nearest pixel), and
    the same random part of ``size`` is cut out of both; where they are smaller, the image is filled up with ``mean``
    and the mask with ``IGNORE``. All randomness comes from PyTorch's default generator.

    Args:
        size: height and width of the output in pixels.
        scale: bounds of the factor relative to the one at which the image just covers ``size``; it is drawn
            log-uniformly.
        jitter: strength of the random changes of brightness, contrast and saturation (each by a factor from
            ``1 - jitter`` to ``1 + jitter``); the hue turns by up to ``jitter / 4`` of the circle. 0 changes nothing.
        horizontal_flip: mirror half of the images.
        centre: cut out the middle part instead of a random one.
        mean: mean of the R, G and B values (scale 0..1), subtracted.
        std: their standard deviation, divided by.

    Raises:
        ValueError: a side of ``size`` is below 1, ``scale`` is no ascending pair above 0, ``jitter`` is not from 0 to
            1, or ``mean`` or ``std`` is not three numbers.
    """
    _check_size(size)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be two factors above 0, the smaller one first, not {scale}.")
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter must be from 0 (no change of colour) to 1, not {jitter}.")
    return _SegmentTrain(size, scale, jitter, horizontal_flip, centre, Normalize(mean, std))


def segment_eval_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    multiple: int | None = 1,
) -> JointTransform:
    """The transform of evaluation: PIL image and mask -> float32 ``[3, h, w]``, normalised, and int64 ``[H, W]``.

    The image goes through ``cover_transform``; the mask keeps its own size, to which predictions are to be resized.
    Arguments and errors as for ``cover_transform``.
    """
    return _SegmentEval(cover_transform(size, mean=mean, std=std, multiple=multiple))


def cover_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    multiple: int | None = 1,
) -> Transform:
    """PIL image -> float32 ``[3, h, w]``, normalised: resized to just cover ``size``, nothing cut off.

    The image keeps its aspect ratio (bilinear, antialiased), so ``h, w`` is ``size`` in one direction and at least
    ``size`` in the other. Errors as for ``segment_train_transform``.

    Args:
        size: height and width.
        mean: see ``Normalize``.
        std: likewise.
        multiple: what ``h`` and ``w`` are rounded up to a multiple of, for networks that take no others; None: they are
            ``size``, whatever becomes of the aspect ratio.
    """
    _check_size(size)
    return _Cover(size, Normalize(mean, std), multiple)


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be height and width, each 1 or more (pixels), not {size}.")


class _Cover:
    """See ``cover_transform``."""

    def __init__(self, size: tuple[int, int], normalize: Normalize, multiple: int | None) -> None:
        self.size = size
        self.normalize = normalize
        self.multiple = multiple

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size
        if self.multiple is not None:
            factor, unit = _cover_factor(image, self.size), self.multiple
            height, width = (-(-round(side * factor) // unit) * unit for side in (image.height, image.width))
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        result: Tensor = self.normalize(functional.pil_to_tensor(resized))
        return result


class _SegmentEval:
    """See ``segment_eval_transform``."""

    def __init__(self, cover: Transform) -> None:
        self.cover = cover

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        return self.cover(image), _class_numbers(mask)


class _SegmentTrain:
    """See ``segment_train_transform``.

    Pillow resizes, since it takes the part to be resized as fractions of pixels: nothing that is cut off is ever
    computed, and mask and image stay aligned, which v2's nearest neighbour for masks is half a pixel short of.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        jitter: float,
        horizontal_flip: bool,
        centre: bool,
        normalize: Normalize,
    ) -> None:
        self.size = size
        self.scale = scale
        self.flip = horizontal_flip
        self.centre = centre
        self.colour = v2.ColorJitter(jitter, jitter, jitter, jitter / 4) if jitter else None
        self.normalize = normalize

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        low, high = map(math.log, self.scale)
        factor = _cover_factor(image, self.size) * math.exp(low + (high - low) * _chance())
        (top, bottom, height, above), (left, right, width, before) = (
            _window(length, output, factor, 0.5 if self.centre else _chance())
            for length, output in zip((image.height, image.width), self.size, strict=True)
        )
        box = (left, top, right, bottom)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box)
        mask = mask.resize((width, height), Image.Resampling.NEAREST, box)
        if self.flip and _chance() < 0.5:
            image, mask = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, mask))
        if self.colour:
            image = self.colour(image)
        pixels, numbers = self.normalize(functional.pil_to_tensor(image)), _class_numbers(mask)
        below, after = self.size[0] - height - above, self.size[1] - width - before
        if below or above or before or after:
            padding = (before, after, above, below)
            pixels, numbers = F.pad(pixels, padding), F.pad(numbers, padding, value=IGNORE)
        return pixels, numbers


def _cover_factor(image: Image.Image, size: tuple[int, int]) -> float:
    """By how much to enlarge an image so that it just covers height and width."""
    return max(size[0] / image.height, size[1] / image.width)


def _window(length: int, output: int, factor: float, place: float) -> tuple[float, float, int, int]:
    """A part of one side, and where it goes: start and end in the source; length and start in the output.

    Args:
        length: pixels of the source.
        output: pixels of the output.
        factor: what the source is enlarged by.
        place: where the part lies of what there is to choose from, from 0, the start, to 1.
    """
    part = output / factor
    if part <= length:
        start = (length - part) * place
        return start, min(start + part, length), output, 0
    size = min(max(round(length * factor), 1), output)
    return 0, length, size, int((output - size + 1) * place)


def _chance() -> float:
    """A random number from 0 to 1."""
    return float(torch.rand(()))


def _class_numbers(mask: Image.Image) -> Tensor:
    """A mask as int64 ``[H, W]``."""
    return functional.pil_to_tensor(mask)[0].long()
