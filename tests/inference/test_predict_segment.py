"""``pcenet predict`` with a segmentation network: masks, overlays, shares, and names that do not collide."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.cli import main
from pcenet.data import cover_transform
from pcenet.data.files import FolderTree
from pcenet.inference.inputs import InputFile
from pcenet.inference.outputs import OutputNames
from pcenet.inference.segment import write_picture
from pcenet.models import load_model
from pcenet.reporting.colours import class_colours, legend

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
CLASSES = ["sky", "road", "tree", "car"]
# Okabe and Ito's first four colours.
COLOURS = [(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)]


def written(folder: str = "predictions") -> list[dict[str, Any]]:
    return json.loads(Path(folder, "predictions.json").read_text())["predictions"]


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def expected(model_folder: Path, image: Image.Image) -> np.ndarray:
    """Class numbers of the pixels of one image, by the model alone."""
    with torch.inference_mode():
        logits = load_model(model_folder)(cover_transform((32, 48))(image)[None])
        enlarged = torch.nn.functional.interpolate(logits, (image.height, image.width), mode="bilinear")
    return enlarged[0].argmax(0).numpy()


def test_masks_overlays_and_shares(
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = {"pics/a.png": noise(0, 60, 40), "pics/b.png": noise(1, 60, 40), "pics/tall.png": noise(2, 30, 70)}
    lay_out({name: encode(image) for name, image in images.items()} | {"pics/c.png": b"broken"})
    assert main(["predict", str(segmenter_folder), "pics", "--overlay-opacity", "0.25", *CPU]) == 0
    with open("predictions/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for record, row in zip(written(), rows, strict=True):
        image = images[record["file"]]
        numbers = expected(segmenter_folder, image)
        mask = Image.open(Path("predictions", record["mask"]))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "P", image.size)
        assert np.mean(np.asarray(mask) != numbers) < 0.002  # another batch may round two equal logits otherwise
        truth = np.asarray(mask)
        assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(COLOURS)[truth])
        overlay = pixels(Path("predictions", record["overlay"]))
        blended = 0.75 * np.asarray(image) + 0.25 * np.array(COLOURS)[truth]
        assert np.abs(overlay - blended).mean() < 8  # JPEG
        shares = [np.mean(truth == number) for number in range(4)]
        assert list(record["shares"]) == CLASSES
        assert list(record["shares"].values()) == pytest.approx(shares)
        assert [float(row[f"share_{name}"]) for name in CLASSES] == pytest.approx(shares)
        assert (row["file"], row["mask"], row["overlay"]) == (record["file"], record["mask"], record["overlay"])
        seen |= set(truth.flatten())
    assert len(seen) > 1, "the network must tell pixels apart for this test to mean something"
    assert [record["mask"] for record in written()] == ["masks/pics/a.png", "masks/pics/b.png", "masks/pics/tall.png"]
    assert Path("predictions/legend.png").is_file()
    output = capsys.readouterr().out
    assert "left out: pics/c.png" in output
    assert "3 predicted, 1 left out" in output


@pytest.mark.parametrize("values", [[0, 100, 200, 7], [5, 4, 300, 2]])
def test_masks_have_the_values_that_the_network_knows(
    values: list[int],
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    image = noise(0, 60, 40)
    lay_out({"pics/a.png": encode(image)})
    config = json.loads((segmenter_folder / "config.json").read_text()) | {"mask_values": values, "ignored_values": []}
    shutil.copytree(segmenter_folder, "valued")
    Path("valued/config.json").write_text(json.dumps(config))
    assert main(["predict", "valued", "pics", *CPU]) == 0
    numbers, found = expected(segmenter_folder, image), Image.open("predictions/masks/pics/a.png")
    assert np.mean(np.asarray(found) != np.array(values)[numbers]) < 0.002
    assert len(np.unique(numbers)) > 1
    if max(values) < 256:
        reverse = np.array([values.index(value) for value in np.asarray(found).flatten()]).reshape(40, 60)
        assert np.array_equal(np.asarray(found.convert("RGB")), np.array(COLOURS)[reverse])
    assert json.loads(Path("predictions/predictions.json").read_text())["mask_values"] == values


def test_masks_agree_with_eval_for_any_batch(
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    truth = {name: np.random.default_rng(n).integers(0, 4, (40, 60), dtype=np.uint8) for n, name in enumerate("abc")}
    lay_out({f"data/val/images/{name}.png": encode(noise(n, 60, 40)) for n, name in enumerate(truth)})
    lay_out({f"data/val/masks/{name}.png": encode(Image.fromarray(mask)) for name, mask in truth.items()})
    lay_out({"data/classes.txt": "\n".join(CLASSES).encode()})
    masks = []
    for size in ("1", "2"):
        command = [
            "predict",
            str(segmenter_folder),
            "data/val/images",
            "--batch-size",
            size,
            "--out",
            size,
            "--routing",
        ]
        assert main([*command, *CPU]) == 0
        masks.append({Path(record["file"]).stem: pixels(Path(size, record["mask"])) for record in written(size)})
        for record in written(size):
            grids = {name: (len(grid), len(grid[0])) for name, grid in record["routing"].items()}
            # 16 x 24 in patches of 32; 8 x 12 in patches of 8; 4 x 6 in patches of 4; and up again.
            assert list(grids.values()) == [(1, 1), (1, 2), (1, 2), (1, 2), (1, 1)]
    assert np.mean([masks[0][name] != masks[1][name] for name in truth]) < 0.002
    assert main(["eval", str(segmenter_folder), "--data", "data", "--out", ".", "--batch-size", "2", *CPU]) == 0
    confusion = np.zeros((4, 4), dtype=int)
    for name in truth:
        np.add.at(confusion, (truth[name].astype(int), masks[1][name]), 1)
    assert json.loads(Path("eval-data-val.json").read_text())["confusion"] == confusion.tolist()


def test_files_of_one_name_from_two_places(
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    names = ["a.png", "x/pics/a.png", "y/pics/a.png", "y/pics/A.PNG", "y/pics/a.jpg", "x/pics.zip!a.png"]
    lay_out({name: encode(noise(number, 12 + number, 12)) for number, name in enumerate(names)})
    assert main(["predict", str(segmenter_folder), "a.png", "x/pics", "y/pics", "x/pics.zip", "y/../x/pics", *CPU]) == 0
    records = written()
    masks = [record["mask"] for record in records]
    assert masks == [
        "masks/a.png",
        "masks/pics/a.png",
        "masks/pics/A-2.png",
        "masks/pics/a-3.png",
        "masks/pics/a-4.png",
        "masks/pics.zip/a.png",
    ]
    assert [pixels(Path("predictions", mask)).shape[1] for mask in masks] == [12, 13, 15, 16, 14, 17]
    files = {path.relative_to("predictions").as_posix() for path in Path("predictions").rglob("*") if path.is_file()}
    overlays = {record["overlay"] for record in records}
    assert files == {*masks, *overlays, "predictions.csv", "predictions.json", "legend.png"}


LONG = "n" * 249

NAMES = {
    "folder and suffix": ([("a.b.png", "o"), (".png", "")], ["o/a.b", ".png"]),
    "as long as a disk takes": ([(f"{LONG}1.png", ""), (f"{LONG}2.png", "")], ["n" * 200, "n" * 200 + "-2"]),
    "letters of several bytes": ([("\u65e5" * 84, "")], ["\u65e5" * 66]),
    "deep": ([("/".join(["d" * 199] * 6) + "/x.png", "o")], ["x"]),
    "a folder called like a mask": ([("a.jpg", "o"), ("a.png/b.jpg", "o")], ["o/a", "o/a.png_/b"]),
    "two forms of one letter": ([("\u00e9.png", ""), ("e\u0301.png", "")], ["\u00e9", "e\u0301-2"]),
    "blanks and line breaks": (
        [("a b.png", ""), ("a  b.png", ""), ("a\nb.png", ""), ("a\udce9.png", "")],
        ["a b", "a  b", "a\nb", "a\udce9"],
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_masks_differ_and_can_be_written(kind: str, tmp_path: Path) -> None:
    files, expected = NAMES[kind]
    names = OutputNames((".png", ".jpg"))
    tree = FolderTree(tmp_path)
    assert [names.take(InputFile("f", tree, name, origin)) for name, origin in files] == expected
    for name in expected:
        for suffix in (".png", ".jpg"):
            write_picture(Image.new("RGB", (2, 2)), tmp_path / f"{name}{suffix}")


def test_colours_differ_and_the_legend_shows_them() -> None:
    colours = class_colours()
    assert colours[:4] == tuple(COLOURS)
    assert len(set(colours)) == 256
    assert all(len(colour) == 3 and set(colour) <= set(range(256)) for colour in colours)
    # Among 24 classes no two are alike: a step in one channel of a quarter is seen.
    assert min(math.dist(a, b) for a, b in combinations(colours[:24], 2)) > 64
    picture = legend(["sky", "a rather long name of a class"], [0, 1])
    array = np.asarray(picture).astype(int)
    for number in range(2):
        band = array[8 + 28 * number : 28 + 28 * number]
        assert (band == COLOURS[number]).all(-1).sum() > 300
        assert ((band == 0).all(-1)[:, 44:]).sum() > 10, "the name stands beside its colour"
    assert legend(["x"], [0]).width < picture.width
