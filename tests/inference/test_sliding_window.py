"""Large images in windows: what is blended with what weight, and what becomes of small ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcenet
from pcenet.cli import main
from pcenet.data import Normalize
from pcenet.inference.network import Network
from pcenet.inference.windows import SlidingWindow, gaussian, starts

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class PerPixel(nn.Module):
    """Four classes, whose logits are a function of the pixel alone."""

    task = "segment"
    num_classes = 4

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, height, width), "mean": MEAN, "std": STD}
        self.classify = nn.Conv2d(3, self.num_classes, 1)
        self.steps: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == self.pretrained_cfg["input_size"]
        self.steps.append(len(images))
        return self.classify(images)


class ByColumn(PerPixel):
    """Two classes; each column of a window has a probability of the first that is given, whatever the image."""

    num_classes = 2

    def __init__(self, *probabilities: float) -> None:
        super().__init__(1, len(probabilities))
        self.logits = torch.tensor([[math.log(p) for p in probabilities], [math.log(1 - p) for p in probabilities]])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[None, :, None].expand(len(images), -1, -1, -1)


def windows_of(model: Any, overlap: float, batch_size: int = 3) -> SlidingWindow:
    classes = [str(number) for number in range(model.num_classes)]
    return SlidingWindow(Network(model, classes, False, torch.device("cpu"), "fp32"), overlap, batch_size)


@pytest.mark.parametrize(
    ("length", "side", "overlap", "expected"),
    [
        (4, 4, 0.5, [0]),
        (5, 4, 0.0, [0, 1]),
        (8, 4, 0.5, [0, 2, 4]),
        (10, 4, 0.25, [0, 3, 6]),
        (11, 4, 0.25, [0, 2, 4, 7]),  # three steps of at most 3, as even as whole pixels allow
        (12, 4, 0.0, [0, 4, 8]),
        (6, 4, 0.99, [0, 1, 2]),
    ],
)
def test_where_windows_begin(length: int, side: int, overlap: float, expected: list[int]) -> None:
    assert starts(length, side, overlap) == expected


def test_weights_by_hand() -> None:
    # A side of 8 is 8 standard deviations; the middle lies between two pixels.
    expected = [math.exp(-(distance**2) / 2) for distance in (3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5)]
    assert gaussian(8).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("height", "width", "overlap"), [(6, 8, 0.0), (6, 8, 0.25), (17, 31, 0.5), (40, 9, 0.9)])
@torch.inference_mode()
def test_where_a_pixel_decides_alone_windows_change_nothing(height: int, width: int, overlap: float) -> None:
    model = PerPixel(6, 8)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = windows_of(model, overlap)(Image.fromarray(pixels))
    whole = model.classify(Normalize(MEAN, STD)(torch.from_numpy(pixels).movedim(2, 0)[None])).argmax(1)[0]
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), whole)
    assert len(whole.unique()) > 1
    assert max(model.steps) <= 3


def test_overlaps_are_weighted_by_hand() -> None:
    # Windows of 4 pixels begin at 0 and 2; pixel 2 is column 2 of the first and column 0 of the second, pixel 3 columns
    # 3 and 1. A column's distance from the middle is 1.5, 0.5, 0.5, 1.5, a standard deviation 0.5 pixels.
    first, near, far = (0.2, 0.3, 0.45, 0.45), math.exp(-0.5), math.exp(-4.5)
    second_column = 0.3
    assert (near * first[2] + far * first[0]) / (near + far) < 0.5  # pixel 2: 0.4455
    assert (far * first[3] + near * second_column) / (near + far) < 0.5
    image = Image.new("RGB", (6, 1))
    assert windows_of(ByColumn(*first), 0.5)(image).tolist() == [[1, 1, 1, 1, 1, 1]]
    # Pixel 2: 0.9 with a small weight and 0.45 with a large one, 0.458, although their mean is above a half.
    assert windows_of(ByColumn(0.9, 0.2, 0.45, 0.1), 0.5)(image).tolist() == [[0, 1, 1, 1, 1, 1]]
    # However sure it is there: 0.460. (Of logits, 11.5 and -0.2, the mean would be above 0.)
    assert windows_of(ByColumn(0.99999, 0.2, 0.45, 0.1), 0.5)(image).tolist() == [[0, 1, 1, 1, 1, 1]]
    # Pixel 3: 0.2 with a small weight and 0.51 with a large one, 0.504, although their mean is below a half.
    assert windows_of(ByColumn(0.1, 0.51, 0.1, 0.2), 0.5)(image).tolist() == [[1, 0, 1, 0, 1, 1]]


class ByRow(ByColumn):
    """`ByColumn`, turned."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__(*probabilities)
        self.pretrained_cfg["input_size"] = (3, len(probabilities), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[None, :, :, None].expand(len(images), -1, -1, -1)


def test_rows_of_windows_are_weighted_like_columns() -> None:
    image = Image.new("RGB", (1, 6))
    for probabilities, expected in (
        ((0.9, 0.2, 0.45, 0.1), [0, 1, 1, 1, 1, 1]),
        ((0.1, 0.51, 0.1, 0.2), [1, 0, 1, 0, 1, 1]),
    ):
        assert windows_of(ByRow(*probabilities), 0.5)(image).flatten().tolist() == expected


class LargestFloats(TorchDispatchMode):
    """Counts the numbers in the largest floating-point tensor that any operator gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_taller_image_takes_no_more_memory_for_its_probabilities() -> None:
    largest = []
    for height in (20, 200):
        with LargestFloats() as seen:
            windows_of(PerPixel(6, 8), 0.25)(Image.new("RGB", (40, height)))
        largest.append(seen.numbers)
    assert largest == [4 * 6 * 40] * 2  # classes, rows of a window, columns of the image


def test_large_images_in_windows_and_small_ones_as_ever(
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    sizes = {"large": (100, 70), "another": (100, 70), "thin": (200, 20), "small": (30, 20), "same": (48, 32)}
    images = {name: noise(number, *size) for number, (name, size) in enumerate(sizes.items())}
    lay_out({f"pics/{name}.png": encode(image) for name, image in images.items()} | {"pics/broken.png": b"no"})
    command = ["predict", str(segmenter_folder), "pics", *CPU]
    for out, options in {"plain": [], "one": ["--sliding-window", "--batch-size", "1"]}.items():
        assert main([*command, "--out", out, *options]) == 0
    written = {out: json.loads(Path(out, "predictions.json").read_text()) for out in ("plain", "one")}
    assert [(each["sliding_window"], len(each["left_out"])) for each in written.values()] == [(False, 1), (True, 1)]
    masks = {
        out: {
            Path(each["file"]).stem: np.asarray(Image.open(Path(out, each["mask"]))) for each in record["predictions"]
        }
        for out, record in written.items()
    }
    model = pcenet.load_model(segmenter_folder)
    for name, (width, height) in sizes.items():
        assert masks["one"][name].shape == (height, width)
        assert (np.mean(masks["one"][name] != masks["plain"][name]) > 0.02) == (name in ("large", "another"))
        (found,) = model.predict(images[name], sliding_window=True, precision="fp32")
        assert (
            np.mean(found.mask != masks["one"][name]) < 0.002
        )  # another number of windows at once may round otherwise
        assert bool(found.experts) == (name in ("thin", "small"))
    more = model.predict(images["large"], sliding_window=True, overlap=0.75, tta=True, precision="fp32")[0].mask
    assert 0 < np.mean(more != masks["one"]["large"]) < 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SEGMENTER a.png --sliding-window --routing", "routing: windows overlap, so that a patch of the image has"),
        ("SEGMENTER a.png --overlap 0.5", "overlap 0.5 has no effect without sliding_window: give both, or neither"),
        ("SEGMENTER a.png --sliding-window --overlap 1", "overlap must be below 1, got 1"),
        ("CLASSIFIER a.png --sliding-window", "sliding_window is for networks that segment; this one gives a whole"),
    ],
)
def test_mistakes(
    line: str,
    message: str,
    model_folder: Path,
    segmenter_folder: Path,
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lay_out({"a.png": b""})
    words = line.replace("SEGMENTER", str(segmenter_folder)).replace("CLASSIFIER", str(model_folder)).split()
    assert main(["predict", *words, *CPU]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pcenet: error: {message}")
    assert error.count("\n") == 1
    assert not Path("predictions").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap must be a number from 0 on and below 1, got 1.0"),
        ({"sliding_window": "yes"}, "sliding_window must be True or False, got 'yes'"),
    ],
)
def test_mistakes_in_python(options: dict[str, Any], message: str, segmenter_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pcenet.load_model(segmenter_folder).predict(Image.new("RGB", (50, 40)), **options)
