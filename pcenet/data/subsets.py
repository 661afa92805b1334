"""Some images of a source, as a source of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from pcenet.data.base import ImageSource, SegmentationSource
from pcenet.data.loaders import EpochSampler

S = TypeVar("S", ImageSource, SegmentationSource)


class ImageSubset(ImageSource):
    """Images ``indices`` of a source, in this order."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        labels = [source.labels[index] for index in indices]
        super().__init__(source.name, source.split, source.classes, labels, horizontal_flip=source.horizontal_flip)
        self.source = source
        self.indices = indices

    def image(self, index: int) -> Image.Image:
        """The source's image ``indices[index]``."""
        return self.source.image(self.indices[index])

    def file_name(self, index: int) -> str:
        """What the source calls it."""
        return self.source.file_name(self.indices[index])


class SegmentationSubset(SegmentationSource):
    """Images ``indices`` of a source with their masks, in this order."""

    def __init__(self, source: SegmentationSource, indices: Sequence[int]) -> None:
        super().__init__(source.name, source.split, source.classes, horizontal_flip=source.horizontal_flip)
        self.source = source
        self.indices = indices

    @property
    def mask_values(self) -> Sequence[int]:
        """The source's."""
        return self.source.mask_values

    @property
    def ignored_values(self) -> Sequence[int]:
        """The source's."""
        return self.source.ignored_values

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """The source's image ``indices[index]``."""
        return self.source.image(self.indices[index])

    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The source's image and mask ``indices[index]``."""
        return self.source.sample(self.indices[index])

    def file_name(self, index: int) -> str:
        """What the source calls it."""
        return self.source.file_name(self.indices[index])


def first_images(source: S, count: int, seed: int = 0) -> S:
    """The images that a training run sees first: a mixture of classes, where files are sorted by class.

    Args:
        source: the images.
        count: how many; all of them if there are no more.
        seed: the run's seed, which decides the order of its first epoch.
    """
    order = [index for _, index in EpochSampler(len(source), seed=seed)]
    subset = ImageSubset if isinstance(source, ImageSource) else SegmentationSubset
    chosen: S = subset(source, order[:count])  # type: ignore[assignment, arg-type]
    return chosen
