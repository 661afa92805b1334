"""Image and mask go through one geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.data import cover_transform, segment_eval_transform, segment_train_transform

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def painted(height: int, width: int, cell: int = 1) -> tuple[Image.Image, Image.Image]:
    """A mask of random classes 0, 1, 2 in square cells, and its image: channel c is 1 where the class is c."""
    mask = np.random.default_rng(0).integers(0, 3, (height, width), dtype=np.uint8)
    mask = mask.repeat(cell, axis=0).repeat(cell, axis=1)
    return Image.fromarray(np.eye(3, dtype=np.uint8)[mask] * 255), Image.fromarray(mask)


@pytest.mark.parametrize("size", [(40, 60), (64, 32), (21, 90)])
def test_image_and_mask_stay_aligned(size: tuple[int, int]) -> None:
    image, mask = painted(5, 8, cell=12)
    transform = segment_train_transform(size, jitter=0, **PLAIN)
    torch.manual_seed(0)
    ignored = 0
    for _ in range(60):
        pixels, numbers = transform(image, mask)
        assert pixels.shape == (3, *size)
        assert numbers.shape == size
        assert (pixels.dtype, numbers.dtype) == (torch.float32, torch.int64)
        outside = numbers == 255
        assert pixels[:, outside].count_nonzero() == 0
        assert torch.allclose(pixels[:, ~outside].sum(0), torch.ones(()), atol=0.01)
        # A pixel that has more than 3/4 of one colour has its centre there, even at the corner of a cell.
        clear = pixels.amax(0) > 0.76
        assert torch.equal(pixels.argmax(0)[clear], numbers[clear])
        assert clear.sum() > 0.6 * (~outside).sum()
        ignored += bool(outside.any())
    assert 0 < ignored < 60


def test_at_scale_1_and_the_same_shape_nothing_happens() -> None:
    image, mask = painted(6, 9)
    pixels, numbers = segment_train_transform((6, 9), scale=(1, 1), jitter=0, horizontal_flip=False, **PLAIN)(
        image, mask
    )
    assert torch.equal(numbers, torch.from_numpy(np.array(mask)).long())
    assert torch.equal(pixels.argmax(0), numbers)
    assert pixels.max() == 1


def test_the_factor_is_relative_to_covering_and_what_is_cut_out_lies_anywhere() -> None:
    """A 4 x 8 image covers 8 x 8 when it is doubled; of its 8 columns 4 are seen, from 0-4 to 4-8."""
    mask = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(4, axis=0))
    transform = segment_train_transform((8, 8), scale=(1, 1), jitter=0, horizontal_flip=False)
    torch.manual_seed(0)
    rows = [transform(Image.new("RGB", (8, 4)), mask)[1] for _ in range(50)]
    for numbers in rows:
        assert torch.equal(numbers, numbers[:1].expand(8, 8))
        assert int(numbers[0, -1] - numbers[0, 0]) in (3, 4)
    firsts = [int(numbers[0, 0]) for numbers in rows]
    assert set(firsts) == {0, 1, 2, 3, 4}


def test_the_middle_is_cut_out_and_padded_around() -> None:
    """Of 8 columns, doubled, those from 2 to 5 are seen; an image of half the size has as much around it."""
    mask = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(4, axis=0))
    plain = {"jitter": 0, "horizontal_flip": False, "centre": True}
    transform = segment_train_transform((8, 8), scale=(1, 1), **plain)
    for _ in range(5):
        _, numbers = transform(Image.new("RGB", (8, 4)), mask)
        assert numbers[0].tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    small = segment_train_transform((8, 4), scale=(0.5, 0.5), **plain)
    _, numbers = small(Image.new("RGB", (4, 8)), Image.new("L", (4, 8)))
    outside = numbers == 255
    assert outside[:2].all()
    assert outside[6:].all()
    assert outside[:, 0].all()
    assert outside[:, 3].all()
    assert not outside[2:6, 1:3].any()


def test_a_smaller_image_is_padded_anywhere() -> None:
    """At half of covering, a 10 x 10 image is 5 x 5 of the 10 x 10 pixels: 25 count."""
    image, mask = Image.new("RGB", (10, 10), "white"), Image.new("L", (10, 10), 4)
    transform = segment_train_transform((10, 10), scale=(0.5, 0.5), jitter=0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    torch.manual_seed(0)
    corners = set()
    for _ in range(200):
        pixels, numbers = transform(image, mask)
        counts = numbers == 4
        assert int(counts.sum()) == 25
        assert set(numbers.unique().tolist()) == {4, 255}
        assert pixels[:, counts].eq(1).all()
        assert pixels[:, ~counts].eq(0).all()
        corners.add(tuple(counts.nonzero()[0].tolist()))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(6))


def test_scale_is_log_uniform() -> None:
    """From 1/4 to 1: half of all factors are below 1/2, so half of the 16 x 16 images fill less than 8 x 8."""
    image, mask = Image.new("RGB", (16, 16)), Image.new("L", (16, 16))
    transform = segment_train_transform((16, 16), scale=(0.25, 1), jitter=0)
    torch.manual_seed(0)
    sides = [math.sqrt(int((transform(image, mask)[1] == 0).sum())) for _ in range(400)]
    assert min(sides) == 4
    assert max(sides) == 16
    assert 0.4 < sum(side < 8 for side in sides) / 400 < 0.6  # uniform factors would give a third


def test_half_are_mirrored() -> None:
    mask = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    options = {"scale": (1, 1), "jitter": 0.0}
    torch.manual_seed(0)
    for flip, low, high in ((True, 70, 130), (False, 0, 0)):
        transform = segment_train_transform((1, 2), horizontal_flip=flip, **options)
        mirrored = [transform(Image.new("RGB", (2, 1)), mask)[1].tolist() == [[1, 0]] for _ in range(200)]
        assert low <= sum(mirrored) <= high


def test_jitter_changes_colours_and_no_mask() -> None:
    image, mask = Image.new("RGB", (8, 8), (200, 100, 50)), painted(8, 8)[1]
    transform = segment_train_transform((8, 8), scale=(1, 1), horizontal_flip=False)
    torch.manual_seed(0)
    looks = [transform(image, mask) for _ in range(5)]
    assert len({pixels.numpy().tobytes() for pixels, _ in looks}) == 5
    for _, numbers in looks:
        assert torch.equal(numbers, torch.from_numpy(np.array(mask)).long())


def test_chance_is_pytorch_s_alone() -> None:
    image, mask = painted(8, 8)
    transform = segment_train_transform((5, 7))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([transform(image, mask) for _ in range(4)])
    for (left, one), (right, other) in zip(*runs, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((360, 480), (192, 256), (192, 256)),
        ((100, 300), (50, 50), (50, 150)),
        ((10, 7), (20, 21), (30, 21)),
        ((3, 3), (3, 2), (3, 3)),
    ],
)
def test_evaluation_covers_the_size_and_cuts_nothing(
    image: tuple[int, int], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture, mask = Image.new("RGB", image[::-1], (255, 0, 51)), painted(*image)[1]
    pixels, numbers = segment_eval_transform(size, mean=(0, 0, 0), std=(1, 1, 1))(picture, mask)
    assert pixels.shape == (3, *expected)
    assert torch.allclose(pixels, torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand_as(pixels))
    assert torch.equal(numbers, torch.from_numpy(np.array(mask)).long())
    assert torch.equal(cover_transform(size, **PLAIN)(picture), pixels)


@pytest.mark.parametrize(("multiple", "expected"), [(1, (50, 150)), (32, (64, 160)), (50, (50, 150)), (None, (50, 50))])
def test_sides_may_be_multiples_or_all_the_same(multiple: int | None, expected: tuple[int, int]) -> None:
    picture = Image.new("RGB", (300, 100), (255, 0, 51))
    pixels = cover_transform((50, 50), multiple=multiple, **PLAIN)(picture)
    assert pixels.shape == (3, *expected)
    assert torch.allclose(pixels, torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand_as(pixels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 4)}, r"size must be height and width, .* not \(0, 4\)"),
        ({"scale": (2, 1)}, r"scale must be two factors above 0, .* not \(2, 1\)"),
        ({"scale": (0, 1)}, r"scale must be"),
        ({"jitter": 1.5}, r"jitter must be from 0 .* to 1, not 1\.5"),
        ({"std": (1, 1)}, r"mean and std must be three numbers"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_train_transform(**{"size": (4, 4), **options})
