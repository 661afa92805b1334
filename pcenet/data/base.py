"""What every data source promises, and the error that names a data set's fault."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from pcenet.choices import Part
from pcenet.scenes import SceneObject

L = TypeVar("L")

IGNORE = 255  # in a mask: a pixel that does not count


class DataError(ValueError):
    """A fault in a data set: names the file, the rule that it breaks and the way out.

    It keeps its one line when a ``DataLoader``'s worker raises it: PyTorch rebuilds a worker's error as
    ``type(error)(text)``, where the text holds the worker's whole traceback and ends with the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{DataError.__name__}: ")[2].strip())


class Fault(NamedTuple):
    """A fault that does not stop a search for others: the file or folder, and what a ``DataError`` says of it."""

    file: str
    text: str


def faultless(found: tuple[L, Sequence[Fault]], where: str) -> L:
    """What was made of a set; raises a ``DataError`` with the first of its faults, where ``where`` names the set."""
    layout, faults = found
    if faults:
        raise DataError(f"{where}: {faults[0].text}")
    return layout


class Source(ABC):
    """One split of a set of images, without any transform.

    Args:
        name: the name of the set, or the last component of its path, such as ``"cifar10.zip"``.
        split: ``"train"``, ``"val"`` or ``"test"``; of files also ``"all"``.
        classes: class names, by class number; the same for all splits of a set.
        horizontal_flip: whether a mirrored image keeps its meaning (it does not for digits).

    Attributes:
        notes: what was guessed of the set as a whole, and what of it was passed over.
        held_out: whether the set comes without this split, and it is a part of the images for training.
    """

    notes: tuple[Fault, ...] = ()
    held_out = False

    def __init__(self, name: str, split: Part, classes: Sequence[str], *, horizontal_flip: bool = True) -> None:
        self.name = name
        self.split = split
        self.classes = tuple(classes)
        self.horizontal_flip = horizontal_flip

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image ``index``, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""

    @abstractmethod
    def file_name(self, index: int) -> str:
        """What to call image ``index`` in a message."""


class ImageSource(Source):
    """Images with a label each.

    Args:
        name: see `Source`, as for ``split``, ``classes`` and ``horizontal_flip``.
        labels: the class number of each image.
    """

    def __init__(
        self,
        name: str,
        split: Part,
        classes: Sequence[str],
        labels: Sequence[int],
        *,
        horizontal_flip: bool = True,
    ) -> None:
        super().__init__(name, split, classes, horizontal_flip=horizontal_flip)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


class SegmentationSource(Source):
    """Images with a mask each, which gives the class of every pixel."""

    @property
    def mask_values(self) -> Sequence[int]:
        """The value of each class in the masks as they are stored, by class number."""
        return range(len(self.classes))

    @property
    def ignored_values(self) -> Sequence[int]:
        """The values of pixels that do not count, ascending."""
        return (IGNORE,)

    @abstractmethod
    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image ``index`` (see ``image``) and its mask (see ``mask``)."""

    def mask(self, index: int) -> Image.Image:
        """The mask of image ``index``: of the image's size, in mode L; class numbers, or ``IGNORE``.

        Raises:
            DataError: image or mask cannot be read, their sizes differ, or the mask has a value of no class.
        """
        return self.sample(index)[1]


class ObjectSource(SegmentationSource):
    """Images with masks whose objects are known, too, each with one fine attribute.

    Attributes:
        attributes: the categories of each attribute.
    """

    attributes: Mapping[str, Sequence[str]]

    @abstractmethod
    def objects(self, index: int) -> tuple[SceneObject, ...]:
        """The objects that can be seen in image ``index``, numbered 1, 2, ... in this order."""

    @abstractmethod
    def instances(self, index: int) -> npt.NDArray[np.uint8]:
        """``[H, W]``: the number of the object whose attribute a pixel of image ``index`` shows, 0 for none.

        These pixels have the object's class, but an object may have others: of a person whose clothes are known the
        clothes have its number, the face has 0.
        """
