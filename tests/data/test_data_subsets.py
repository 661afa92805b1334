"""Subsets: the images that a run sees first."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pcenet.data import EpochSampler, ImageSource, SegmentationSource, build_loader, eval_transform, first_images


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (index, 0, 0))


class Labelled(ImageSource):
    """Ten images sorted by class; image i has red i."""

    def __init__(self) -> None:
        super().__init__("ten", "train", ("a", "b"), [0] * 5 + [1] * 5, horizontal_flip=False)

    def image(self, index: int) -> Image.Image:
        return picture(index)

    def file_name(self, index: int) -> str:
        return f"{index}.png"


class Masked(SegmentationSource):
    """Ten images; image i has red i and a mask of i."""

    def __init__(self) -> None:
        super().__init__("ten", "train", ("a", "b"))

    def __len__(self) -> int:
        return 10

    def image(self, index: int) -> Image.Image:
        return picture(index)

    def file_name(self, index: int) -> str:
        return f"{index}.png"

    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        return picture(index), Image.new("L", (4, 4), index)


def red(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def test_labelled_images_keep_their_labels_and_names() -> None:
    order = [index for _, index in EpochSampler(10, seed=3)]
    subset = first_images(Labelled(), 4, seed=3)
    assert (len(subset), subset.name, subset.classes, subset.horizontal_flip) == (4, "ten", ("a", "b"), False)
    assert [red(subset.image(i)) for i in range(4)] == order[:4]
    assert [subset.file_name(i) for i in range(4)] == [f"{index}.png" for index in order[:4]]
    assert list(subset.labels) == [int(index >= 5) for index in order[:4]]


def test_they_are_those_of_the_first_batch() -> None:
    transform = eval_transform(4, mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = next(iter(build_loader(Labelled(), transform, batch_size=4, seed=3, train=True)))
    subset = first_images(Labelled(), 4, seed=3)
    assert (images[:, 0, 0, 0] * 255).round().int().tolist() == [red(subset.image(i)) for i in range(4)]


def test_masks_come_along() -> None:
    order = [index for _, index in EpochSampler(10, seed=3)]
    subset = first_images(Masked(), 4, seed=3)
    for i, index in enumerate(order[:4]):
        image, mask = subset.sample(i)
        assert red(image) == red(subset.image(i)) == index
        assert np.asarray(mask)[0, 0] == np.asarray(subset.mask(i))[0, 0] == index
        assert subset.file_name(i) == f"{index}.png"
    assert len(subset) == 4


def test_there_are_no_more_than_all() -> None:
    assert len(first_images(Labelled(), 99)) == 10
