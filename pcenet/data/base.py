"""What every data source promises, and the error that names a data set's fault."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image

from pcenet.choices import Split


class DataError(ValueError):
    """A fault in a data set: names the file, the rule that it breaks and the way out.

    It keeps its one line when a ``DataLoader``'s worker raises it: PyTorch rebuilds a worker's error as
    ``type(error)(text)``, where the text holds the worker's whole traceback and ends with the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{DataError.__name__}: ")[2].strip())


class ImageSource(ABC):
    """One split of a labelled set of images, without any transform.

    Args:
        name: the name of the set, or the last component of its path, such as ``"cifar10.zip"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        classes: class names, by class number; the same for all splits of a set.
        labels: the class number of each image.
        horizontal_flip: whether a mirrored image keeps its label (it does not for digits).
    """

    def __init__(
        self,
        name: str,
        split: Split,
        classes: Sequence[str],
        labels: Sequence[int],
        *,
        horizontal_flip: bool = True,
    ) -> None:
        self.name = name
        self.split = split
        self.classes = tuple(classes)
        self.labels = labels
        self.horizontal_flip = horizontal_flip

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image ``index``, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""

    @abstractmethod
    def file_name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
