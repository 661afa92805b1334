"""From PIL images to normalised tensors, by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pcenet.data import IMAGENET_MEAN, IMAGENET_STD, Normalize, eval_transform, train_transform
from pcenet.data.transforms import Augment

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def picture(height: int, width: int) -> Image.Image:
    """Every pixel differs from its neighbours: red counts columns, green counts rows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8))


def values(tensor: Tensor) -> np.ndarray:
    """[3, H, W] in 0..1 -> [H, W, 3] in 0..255."""
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_normalisation_by_hand() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    for transform in (eval_transform(4), train_transform(4)):
        result = transform(image)
        assert result.shape == (3, 4, 4)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
        assert result.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-6)
        assert result.std(dim=(1, 2)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("augment", ["crop", "resized_crop", "randaugment", "none"])
def test_a_gpu_normalises_to_the_same_bits(augment: Augment) -> None:
    image = picture(20, 24)
    torch.manual_seed(3)
    expected = train_transform(16, augment=augment)(image)
    torch.manual_seed(3)
    raw = train_transform(16, augment=augment, normalize=False)(image)
    assert raw.dtype == torch.uint8
    batch = Normalize(IMAGENET_MEAN, IMAGENET_STD)(torch.stack([raw, raw]))
    assert torch.equal(batch, torch.stack([expected, expected]))


def test_what_is_erased_is_normalised_first() -> None:
    with pytest.raises(ValueError, match=r"^random_erasing 0.5 is of normalised images: leave out normalize=False"):
        train_transform(16, random_erasing=0.5, normalize=False)


def test_evaluation_cuts_out_the_centre() -> None:
    assert np.array_equal(values(eval_transform(4, **RAW)(picture(4, 8))), np.asarray(picture(4, 8))[:, 2:6])
    assert np.array_equal(values(eval_transform(4, **RAW)(picture(8, 4))), np.asarray(picture(8, 4))[2:6])


def test_evaluation_resizes_to_the_shorter_side() -> None:
    black, white = Image.new("RGB", (8, 4)), Image.new("RGB", (8, 4), "white")
    image = Image.new("RGB", (16, 4))
    image.paste(black, (0, 0))
    image.paste(white, (8, 0))
    result = eval_transform(8, **RAW)(image)  # 8 x 32, of which columns 12..19 remain: the edge is in the middle
    assert result[:, :, :3].max() == 0
    assert result[:, :, 5:].min() == 1


@pytest.mark.parametrize("horizontal_flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 20)])
def test_crop_shifts_by_an_eighth_and_reflects(height: int, width: int, horizontal_flip: bool) -> None:
    """Each result is one of the windows of the image continued by reflection, and each window occurs."""
    size, margin = 16, 2
    padded = np.pad(np.asarray(picture(height, width)), ((margin, margin), (margin, margin), (0, 0)), "reflect")
    windows = {}
    for top in range(padded.shape[0] - size + 1):
        for left in range(padded.shape[1] - size + 1):
            window = padded[top : top + size, left : left + size]
            windows[window.tobytes()] = (top, left, False)
            if horizontal_flip:
                windows[window[:, ::-1].tobytes()] = (top, left, True)
    transform = train_transform(size, augment="crop", horizontal_flip=horizontal_flip, **RAW)
    found = {windows[values(transform(picture(height, width))).tobytes()] for _ in range(1000)}
    assert len(found) == 5 * (width - size + 5) * (1 + horizontal_flip)


def test_auto_depends_on_the_size_of_the_image() -> None:
    def run(augment: Augment, side: int) -> Tensor:
        torch.manual_seed(3)
        return train_transform(33, augment=augment)(picture(side + 10, side))

    for side in (8, 33, 49):  # up to 1.5 * 33 = 49.5
        assert torch.equal(run("auto", side), run("crop", side))
        assert not torch.equal(run("auto", side), run("resized_crop", side))
    for side in (50, 200):
        assert torch.equal(run("auto", side), run("resized_crop", side))
        assert not torch.equal(run("auto", side), run("crop", side))


def test_none_is_the_transform_of_evaluation() -> None:
    image = picture(20, 30)
    expected = eval_transform(16)(image)
    assert all(torch.equal(train_transform(16, augment="none")(image), expected) for _ in range(5))


def test_randaugment_adds_to_auto() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def run(augment: Augment, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return train_transform(16, augment=augment)(image)

    differ = [not torch.equal(run("auto", seed), run("randaugment", seed)) for seed in range(20)]
    assert sum(differ) > 10
    assert torch.equal(run("randaugment", 1), run("randaugment", 1))


def test_without_flip_nothing_is_mirrored() -> None:
    for augment in ("auto", "crop", "resized_crop"):
        transform = train_transform(16, augment=augment, horizontal_flip=False, **RAW)
        for _ in range(20):
            red = transform(picture(64, 64))[0]
            assert (red[:, 12] >= red[:, 3]).all()


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.sampled_from(["auto", "crop", "resized_crop", "randaugment", "none"]),
)
def test_any_image_fits_any_input(height: int, width: int, size: int, augment: Augment) -> None:
    result = train_transform(size, augment=augment)(picture(height, width))
    assert result.shape == (3, size, size)
    assert result.is_contiguous()
    assert result.isfinite().all()


def test_transforms_can_be_sent_to_a_worker() -> None:
    transform = pickle.loads(pickle.dumps(train_transform(16, augment="none")))
    assert torch.equal(transform(picture(16, 16)), eval_transform(16)(picture(16, 16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": "randaug"},
            r"augment must be one of auto, .*, not 'randaug'; did you mean 'randaugment'\?",
        ),
        ({"size": 0}, "size must be 1 or more"),
        ({"mean": (0.5,)}, r"mean and std .* mean=\(0\.5,\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_transform(**{"size": 8, **options})
