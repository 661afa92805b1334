"""The known data sets: small arrays held in memory."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pcenet.choices import Split
from pcenet.data.base import DataError, ImageSource
from pcenet.data.splits import hold_out

Images = npt.NDArray[np.uint8]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


class ArraySource(ImageSource):
    """Some images out of an array.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, 3]``, uint8.
        labels: the class number of each of the N images.
        indices: which of the N images, in which order, this split consists of.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        classes: Sequence[str],
        images: Images,
        labels: Sequence[int],
        indices: Sequence[int],
        *,
        horizontal_flip: bool = True,
    ) -> None:
        super().__init__(name, split, classes, [labels[index] for index in indices], horizontal_flip=horizontal_flip)
        self._images = images
        self._indices = indices

    def image(self, index: int) -> Image.Image:
        """Image ``index`` in mode RGB; grey levels are repeated."""
        return Image.fromarray(self._images[self._indices[index]]).convert("RGB")

    def file_name(self, index: int) -> str:
        """Such as ``digits val[3]``: the images have no files of their own."""
        return f"{self.name} {self.split}[{index}]"


def open_digits(split: Split, root: Path) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey levels 0..16 scaled to 0..255; split 80/10/10."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the data source 'digits' needs scikit-learn. Install it with: pip install 'pcenet[digits]'"
        ) from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    classes = [str(digit) for digit in digits.target_names]
    labels = digits.target.tolist()
    indices = _held_out("digits", classes, labels, ("val", "test"))[split]
    return ArraySource("digits", split, classes, images, labels, indices, horizontal_flip=False)


def open_fashion_mnist(split: Split, root: Path) -> ImageSource:
    """Fashion-MNIST, 28x28: Debian's package ``dataset-fashion-mnist`` if installed, else downloaded."""
    from torchvision.datasets import FashionMNIST

    if DEBIAN_FASHION_MNIST.is_dir():
        stem = "t10k" if split == "test" else "train"
        images = _read_idx(DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz")
        labels = _read_idx(DEBIAN_FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz").tolist()
    else:
        data = _download("fashion-mnist", FashionMNIST, split, root)
        images, labels = data.data.numpy(), data.targets.tolist()
    return _train_and_test("fashion-mnist", split, FashionMNIST.classes, images, labels)


def open_cifar10(split: Split, root: Path) -> ImageSource:
    """CIFAR-10, 32x32, downloaded by torchvision."""
    from torchvision.datasets import CIFAR10

    data = _download("cifar10", CIFAR10, split, root)
    return _train_and_test("cifar10", split, data.classes, data.data, data.targets)


def open_cifar100(split: Split, root: Path) -> ImageSource:
    """CIFAR-100 with its 100 fine classes, 32x32, downloaded by torchvision."""
    from torchvision.datasets import CIFAR100

    data = _download("cifar100", CIFAR100, split, root)
    return _train_and_test("cifar100", split, data.classes, data.data, data.targets)


KNOWN_SOURCES: Mapping[str, Callable[[Split, Path], ImageSource]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion_mnist,
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
}


def _train_and_test(
    name: str, split: Split, classes: Sequence[str], images: Images, labels: Sequence[int]
) -> ArraySource:
    """A split of a set that comes as train and test; ``images`` are those that ``split`` is taken from."""
    if split == "test":
        indices: Sequence[int] = range(len(labels))
    else:
        indices = _held_out(name, classes, labels, ("val",))[split]
    return ArraySource(name, split, classes, images, labels, indices)


def _held_out(name: str, classes: Sequence[str], labels: Sequence[int], parts: Sequence[str]) -> dict[str, list[int]]:
    keys = [str(index) for index in range(len(labels))]
    return hold_out(keys, labels, parts, classes=classes, where=name)


def _download(name: str, dataset: Callable[..., Any], split: Split, root: Path) -> Any:
    try:
        return dataset(root, train=split != "test", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the data source '{name}' could not be downloaded to '{root}' ({error}). Check network and"
            f" folder, or use 'digits' or a set of your own, which need no network."
        ) from error


def _read_idx(path: Path) -> Images:
    """An array of bytes in the gzipped IDX format: 0 0 8 D, then D sizes (big-endian), then the values."""
    try:
        data = gzip.decompress(path.read_bytes())
        dimensions = data[3]
        sizes = struct.unpack_from(f">{dimensions}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
    except (OSError, EOFError, zlib.error, IndexError, struct.error, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a gzipped IDX file ({error}). Reinstall it.") from error
