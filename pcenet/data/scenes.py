"""The data set ``scenes``: street scenes that are drawn when they are asked for, with all that is in them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from pcenet.choices import Split
from pcenet.data.base import DataError, ObjectSource
from pcenet.scenes import SceneObject
from pcenet.scenes.drawing import CLASSES, Scene, draw_scene
from pcenet.scenes.objects import ATTRIBUTES

NAME = "scenes"
VERSION = 1  # another one for every change of what is drawn, so that nobody takes the results of one for the other's
COUNTS: dict[Split, int] = {"train": 800, "val": 200, "test": 200}
SIZE = (128, 128)  # such that the patches of the U-shaped networks divide their maps
SMALLEST = 32


class SceneSource(ObjectSource):
    """Streets with people, trees, buildings and pavements, whose fine attributes are known.

    ============  =============  ==================================================
    class         attribute      categories
    ============  =============  ==================================================
    building      ``roughness``  of its wall: smooth, fine, coarse, rough
    pavement      ``pattern``    plain, slabs, bricks, herringbone, cobbles
    tree          ``leaves``     green, gold, red, blossom
    person        ``clothes``    of the upper body: red, yellow, green, blue, violet
    ============  =============  ==================================================

    Of a pavement those pixels count that are so near that every pattern can be seen there.

    An object's category is drawn by itself, each as likely as the others: neither class, place nor any other object
    gives it away. An image depends on version, split, index and size alone (and on the versions of numpy and Pillow
    where these change how they draw). What was drawn once is kept, 80 KB for an image of the usual size.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        count: number of images; None: 800, 200 or 200. More of them leave the first ones as they are.
        size: height and width in pixels, each 32 or more.

    Raises:
        DataError: (a ``ValueError``) ``count`` or a side of ``size`` is too small.
    """

    attributes = ATTRIBUTES

    def __init__(self, split: Split, *, count: int | None = None, size: tuple[int, int] = SIZE) -> None:
        super().__init__(NAME, split, CLASSES)
        self._count = COUNTS[split] if count is None else count
        if self._count < 1:
            raise DataError(f"count must be 1 or more, not {count}.")
        if min(size) < SMALLEST:
            raise DataError(f"size must be height and width in pixels, each {SMALLEST} or more, not {size}.")
        self._size = size
        self._drawn: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self._count

    def scene(self, index: int) -> Scene:
        """All of image ``index`` at once."""
        if not 0 <= index < self._count:
            raise IndexError(f"{self.name} has {self._count} images in {self.split}, and no image {index}")
        if index not in self._drawn:
            seed = (VERSION, get_args(Split).index(self.split), index)
            self._drawn[index] = draw_scene(np.random.default_rng(seed), self._size)
        return self._drawn[index]

    def image(self, index: int) -> Image.Image:
        """Image ``index`` in mode RGB."""
        return Image.fromarray(self.scene(index).image)

    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image ``index`` and its mask, see `SegmentationSource`."""
        return self.image(index), Image.fromarray(self.scene(index).mask)

    def objects(self, index: int) -> tuple[SceneObject, ...]:
        """The objects that can be seen in image ``index``, see `ObjectSource`."""
        return self.scene(index).objects

    def instances(self, index: int) -> npt.NDArray[np.uint8]:
        """``[H, W]``: the number of the object at each pixel of image ``index``, see `ObjectSource`."""
        return self.scene(index).instances

    def file_name(self, index: int) -> str:
        """Such as ``scenes val[3]``: the images have no files."""
        return f"{self.name} {self.split}[{index}]"
