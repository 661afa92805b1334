"""Mask values -> class numbers, and masks that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.data import (
    IGNORE,
    DataError,
    check_data,
    open_segmentation_source,
    quick_check,
    read_class_names,
)

Tree = Callable[[str, Mapping[str, int]], Path]
Pack = Callable[[Path], Path]

VALUES = np.array([[0, 1, 2], [3, 255, 3]], dtype=np.uint8)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """One pair for training and one for validation, 3 x 2 pixels: values 0 to 3, and 255."""
    for split in ("train", "val"):
        for kind, pixels in (("images", np.zeros((2, 3, 3), np.uint8)), ("masks", VALUES)):
            (tmp_path / f"scene/{split}/{kind}").mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / f"scene/{split}/{kind}/a.png")
    return tmp_path / "scene"


def mask(source: Path, split: str = "train", **options: object) -> list[list[int]]:
    found = open_segmentation_source(source, split, **options).mask(0)
    assert found.mode == "L"
    return np.asarray(found).tolist()


@pytest.mark.parametrize(
    ("ignore_index", "classes", "expected"),
    [
        (None, ("0", "1", "2", "3"), [[0, 1, 2], [3, 255, 3]]),
        (3, ("0", "1", "2"), [[0, 1, 2], [255, 255, 255]]),
        (0, ("1", "2", "3"), [[255, 0, 1], [2, 255, 2]]),
        (1, ("0", "2", "3"), [[0, 255, 1], [2, 255, 2]]),
        (9, ("0", "1", "2", "3"), [[0, 1, 2], [3, 255, 3]]),
    ],
)
def test_classes_are_the_values_that_count(
    scene: Path, pack: Pack, ignore_index: int | None, classes: tuple[str, ...], expected: list[list[int]]
) -> None:
    for path in (scene, pack(scene)):
        source = open_segmentation_source(path, "val", ignore_index=ignore_index)
        assert source.classes == classes
        assert (source.name, source.split, source.horizontal_flip) == (path.name, "val", True)
        assert source.file_name(0) == "val/images/a.png"
        assert mask(path, "val", ignore_index=ignore_index) == expected
    assert IGNORE == 255


def test_names_from_a_list_from_a_file_and_from_the_set(scene: Path, tmp_path: Path) -> None:
    names = ["sky", "road", "car", "void", "bus"]
    file = tmp_path / "names.txt"
    file.write_text("sky\n road\ncar \nvoid\nbus\n\n", encoding="utf-8-sig")
    assert read_class_names(file) == names
    for classes in (names, str(file)):
        assert open_segmentation_source(scene, "train", classes=classes).classes == tuple(names)
    shutil.copy(file, scene / "classes.txt")
    source = open_segmentation_source(scene, "val", ignore_index=1)
    assert source.classes == ("sky", "car", "void", "bus")
    assert np.asarray(source.mask(0)).tolist() == [[0, 255, 1], [2, 255, 2]]


def test_classes_are_those_of_all_masks_that_came_for_training(make_pairs: Tree) -> None:
    folder = make_pairs("street", {"": 10})
    for index in range(10):
        Image.new("L", (12, 8), index).save(folder / f"masks/{index:03}.png")
    for split, count in (("train", 8), ("val", 1), ("test", 1)):
        source = open_segmentation_source(folder, split)
        assert source.classes == tuple("0123456789")
        assert len(source) == count


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_modes_of_masks(scene: Path, mode: str) -> None:
    values = np.array([[0, 1, 0], [1, 0, 1]], np.uint8)
    if mode == "P":
        image = Image.fromarray(values).convert("P")
        image.putpalette([128, 0, 0, 0, 128, 0])
        image.putdata(values.flatten().tolist())
    elif mode == "1":
        image = Image.fromarray(values * 255).convert("1")
    else:
        image = Image.fromarray(values.astype(np.uint16))
    assert image.mode == mode
    image.save(scene / "train/masks/a.png")
    assert mask(scene) == values.tolist()


def test_image_and_mask_are_upright(scene: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 2)).save(scene / "train/images/a.png", exif=exif)
    with pytest.raises(DataError, match=r"'train/masks/a\.png': the mask has 3 x 2 pixels, but its image.* has 2 x 3"):
        mask(scene)
    Image.fromarray(VALUES).save(scene / "train/masks/a.png", exif=exif)
    assert mask(scene) == [[3, 0], [255, 1], [3, 2]]  # a quarter turn clockwise


def refuse(path: Path, content: Image.Image | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (Image.new("RGB", (3, 2)), ["mode is RGB", "one channel", "palette PNG"]),
        (Image.new("LA", (3, 2)), ["mode is LA"]),
        (Image.fromarray(np.full((2, 3), 300, np.uint16)), ["has the value 300", "0 to 255"]),
        (Image.new("L", (4, 2)), ["4 x 2", "3 x 2"]),
        (Image.new("L", (3, 2), 7), ["value(s) 7", "values 0-3", "255 do(es) not count", "ignore_index"]),
        (b"", ["cannot be read as an image"]),
        (b"<html>", ["cannot be read as an image"]),
    ],
)
def test_a_faulty_mask_is_refused_by_name(scene: Path, content: Image.Image | bytes, parts: list[str]) -> None:
    refuse(scene / "val/masks/a.png", content)
    source = open_segmentation_source(scene, "val")
    with pytest.raises(DataError) as caught:
        source.mask(0)
    for part in [f"{scene}: 'val/masks/a.png': ", *parts]:
        assert part in str(caught.value)


def test_an_unreadable_mask_for_training_is_named_where_it_is_searched_for_classes(scene: Path) -> None:
    (scene / "train/masks/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'train/masks/a\.png': the file cannot be read as an image"):
        open_segmentation_source(scene, "val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": 256}, r"ignore_index must be a mask value from 0 to 255, not 256"),
        ({"ignore_index": -1}, r"ignore_index must be .* not -1"),
        ({"classes": ["sky"]}, r"two or more classes, but there is 'sky' \(mask values 255"),
        ({"classes": ["sky", "road"], "ignore_index": 0}, r"there is 'road' \(mask values 0, 255 do not count\)"),
        ({"classes": []}, r"classes: there are no class names"),
        ({"classes": ["sky", "road", "sky"]}, r"classes: the class name 'sky' stands for the mask values 0 and 2"),
        ({"classes": "nowhere.txt"}, r"nowhere\.txt: .* cannot be read \(No such file"),
        ({"classes": [str(number) for number in range(256)]}, r"256 class names; .* 255 at most"),
    ],
)
def test_faulty_classes_are_refused(scene: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_segmentation_source(scene, "train", **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no class names"),
        (b"\n\n", "no class names"),
        (b"sky\n\nroad", "value 1 .line 2. is empty"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_faulty_file_of_class_names_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"c\.txt: .*{message}"):
        read_class_names(tmp_path / "c.txt")


def test_a_set_that_cannot_be_opened(scene: Path) -> None:
    with pytest.raises(
        DataError, match=r"split must be one of train, val, test, all, not 'vall'; did you mean 'val'\?"
    ):
        open_segmentation_source(scene, "vall")
    with pytest.raises(
        DataError, match=r"'scens' does not exist: it must be scenes, or the path of a folder, \.zip or \.csv"
    ):
        open_segmentation_source("scens", "val")
    shutil.rmtree(scene / "train")
    with pytest.raises(DataError, match=r"scene: the classes are unknown, .*classes\.txt"):
        open_segmentation_source(scene, "val")
    assert open_segmentation_source(scene, "val", classes=list("abcd")).classes == tuple("abcd")


def with_values(make_pairs: Tree, *values: int) -> Path:
    """Ten pairs of 12 x 8 pixels, whose masks have each of these values in equal parts."""
    folder = make_pairs("binary", {"": 10})
    pixels = np.repeat(np.array(values, np.uint8), 96 // len(values)).reshape(8, 12)
    for index in range(10):
        Image.fromarray(pixels).save(folder / f"masks/{index:03}.png")
    return folder


@pytest.mark.parametrize(
    ("values", "ignore_index", "classes"),
    [
        ((0, 255), "none", ("0", "255")),
        ((0, 128, 255), "none", ("0", "128", "255")),
        ((0, 128, 255), None, ("0", "128")),
        ((0, 128, 255), 255, ("0", "128")),
        ((0, 1, 128, 255), 128, ("0", "1")),
    ],
)
def test_255_is_a_class_where_everything_counts(
    make_pairs: Tree, values: tuple[int, ...], ignore_index: int | str | None, classes: tuple[str, ...]
) -> None:
    source = open_segmentation_source(with_values(make_pairs, *values), "val", ignore_index=ignore_index)
    assert source.classes == classes
    expected = {classes.index(str(value)) if str(value) in classes else IGNORE for value in values}
    assert set(np.unique(np.asarray(source.mask(0))).tolist()) == expected


def test_masks_of_0_and_255_alone_are_asked_about(make_pairs: Tree) -> None:
    folder = with_values(make_pairs, 0, 255)
    message = (
        r"there is '0' \(mask values 255 do not count\)\. .* Or is 255 a class, too\? Then give --ignore-index none"
    )
    with pytest.raises(DataError, match=message):
        open_segmentation_source(folder, "train")
    (finding,) = check_data(folder, "segment").findings
    assert (finding.severity, finding.kind) == ("error", "classes")
    assert "--ignore-index none" in finding.message
    assert check_data(folder, "segment", ignore_index="none").usable


def test_more_values_than_class_numbers(make_pairs: Tree) -> None:
    folder = make_pairs("many", {"": 10})
    for index in range(10):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"images/{index:03}.png")
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / f"masks/{index:03}.png")
    assert len(open_segmentation_source(folder, "train").classes) == 255
    with pytest.raises(DataError, match="the masks have 256 values that count; there can be 255 classes at most"):
        open_segmentation_source(folder, "train", ignore_index="none")


def test_the_pixels_that_do_not_count_are_counted(make_pairs: Tree) -> None:
    folder = with_values(make_pairs, 0, 128, 255)
    report = check_data(folder, "segment")
    assert report.ignored == {"train": 8 * 32, "val": 32, "test": 32}
    (finding,) = report.findings
    assert (finding.severity, finding.kind) == ("warning", "pixels that do not count")
    assert finding.message.startswith("33.3% of the training pixels do not count (mask values 255).")
    assert "--ignore-index: with none every value counts, 255 too" in finding.message
    (quick,) = quick_check({"train": open_segmentation_source(folder, "train")})
    assert quick.message.startswith("33.3% of the training pixels do not count.")
    whole = check_data(folder, "segment", ignore_index="none")
    assert (whole.findings, whole.ignored) == ((), {"train": 0, "val": 0, "test": 0})


def test_a_class_whose_pixels_were_given_away_is_named(make_pairs: Tree) -> None:
    """Masks of 0 and 255 with names for 0 and 1: the second class can never be learnt."""
    folder = with_values(make_pairs, 0, 255)
    report = check_data(folder, "segment", classes=["ground", "thing"])
    messages = {finding.kind: finding.message for finding in report.findings}
    assert messages["class balance"].startswith("class 'thing' has no training pixel: it can never be learnt.")
    assert messages["pixels that do not count"].startswith(
        "50.0% of the training pixels do not count (mask values 255)."
    )
    with pytest.raises(
        DataError, match=r"255, which are of no class: the classes are the values 0-1, and every value counts"
    ):
        open_segmentation_source(folder, "train", classes=["ground", "thing"], ignore_index="none").mask(0)
