"""Planted faults are found by name, all of them at once."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.data import (
    CheckReport,
    DataError,
    check_data,
    open_segmentation_source,
    open_source,
    quick_check,
)
from pcenet.data.arrays import ArraySource

Tree = Callable[[str, Mapping[str, int]], Path]
Pack = Callable[[Path], Path]

SOUND = {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2}


@pytest.fixture
def pets(make_tree: Tree) -> Path:
    return make_tree("pets", SOUND)


@pytest.fixture
def street(make_pairs: Tree) -> Path:
    return make_pairs("street", {"train": 4, "val": 2})


def noise(*shape: int, seed: int = 99) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def found(report: CheckReport) -> set[tuple[str, str, str]]:
    return {(finding.severity, finding.kind, finding.file) for finding in report.findings}


def message(report: CheckReport, file: str) -> str:
    (text,) = [finding.message for finding in report.findings if finding.file == file]
    return text


def bomb() -> bytes:
    """A PNG file of a few bytes that says that it has 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_a_sound_set(pets: Path, pack: Pack) -> None:
    for path in (pets, pack(pets)):
        report = check_data(path)
        assert report.findings == ()
        assert report.usable
        assert report.classes == ("cat", "dog")
        assert report.images == {"train": 8, "val": 4}
        assert report.counts == {"train": {"cat": 4, "dog": 4}, "val": {"cat": 2, "dog": 2}}
        assert report.shares == {"cat": 0.5, "dog": 0.5}
        assert report.sizes == {"12 x 12": 12}
        assert report.kinds == {"PNG RGB": 12}
        assert sorted(sample.label for sample in report.samples) == ["cat"] * 4 + ["dog"] * 4
        assert json.loads(json.dumps(report.to_json()))["usable"] is True


def test_a_set_to_be_split_is_counted_as_training_will_see_it(make_tree: Tree) -> None:
    report = check_data(make_tree("pets", {"cat": 20, "dog": 10}))
    assert report.counts == {
        "train": {"cat": 16, "dog": 8},
        "val": {"cat": 2, "dog": 1},
        "test": {"cat": 2, "dog": 1},
    }
    assert report.usable


BROKEN = {
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "text.jpg": (b"see the other folder\n", "text"),
    "archive.jpg": (b"PK\x03\x04" + bytes(40), "known format"),
    "bomb.png": (bomb(), "MAX_IMAGE_PIXELS"),
}


def test_every_broken_image_is_named_with_its_reason(pets: Path) -> None:
    for name, (content, _) in BROKEN.items():
        (pets / "train/cat" / name).write_bytes(content)
    buffer = io.BytesIO()
    noise(64, 64, 3).save(buffer, "JPEG")
    (pets / "val/dog/cut.jpg").write_bytes(buffer.getvalue()[:900])
    report = check_data(pets)
    files = {f"train/cat/{name}" for name in BROKEN} | {"val/dog/cut.jpg"}
    assert found(report) == {("error", "broken image", file) for file in files}
    for name, (_, reason) in BROKEN.items():
        assert reason in message(report, f"train/cat/{name}")
    assert "truncated" in message(report, "val/dog/cut.jpg")
    assert not report.usable
    assert report.sizes == {"12 x 12": 12}


def test_odd_images_that_load_are_warnings(pets: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = noise(12, 12, 3, seed=1).convert("P")
    noise(12, 12, 3, seed=2).save(pets / "train/cat/turned.jpg", exif=exif)
    noise(12, 12, 3, seed=3).convert("CMYK").save(pets / "train/cat/print.jpg")
    Image.fromarray(np.arange(144, dtype=np.uint16).reshape(12, 12) * 400).save(pets / "train/cat/deep.png")
    noise(12, 12, 3, seed=4).save(
        pets / "train/dog/moving.gif", save_all=True, append_images=[noise(12, 12, 3, seed=5)]
    )
    alpha.save(pets / "train/dog/alpha.png", transparency=0)
    noise(4, 30, 3).save(pets / "val/dog/tiny.png")
    report = check_data(pets)
    reasons = {
        "train/cat/turned.jpg": "EXIF",
        "train/cat/print.jpg": "CMYK",
        "train/cat/deep.png": "its grey values, 0 to 57200, have more than 8 bits; 0 is black and 65535 white",
        "train/dog/moving.gif": "animation",
        "train/dog/alpha.png": "transparency",
        "val/dog/tiny.png": "30 x 4",
    }
    assert {finding.file for finding in report.findings} == set(reasons)
    assert {finding.severity for finding in report.findings} == {"warning"}
    for file, reason in reasons.items():
        assert reason in message(report, file)
    assert report.usable
    assert report.sizes == {"12 x 12": 17, "30 x 4": 1}


def test_duplicates_are_named_as_pairs(pets: Path) -> None:
    shutil.copy(pets / "train/cat/000.png", pets / "val/cat/copy.png")
    shutil.copy(pets / "train/cat/001.png", pets / "train/dog/other.png")
    Image.open(pets / "train/dog/002.png").save(pets / "val/dog/same.bmp")
    report = check_data(pets)
    assert found(report) == {
        ("warning", "duplicate between splits", "val/cat/copy.png"),
        ("warning", "duplicate between splits", "val/dog/same.bmp"),
        ("warning", "duplicate", "train/dog/other.png"),
    }
    text = message(report, "val/cat/copy.png")
    assert "'train/cat/000.png' shows (the same file)" in text
    assert "in val and that in train" in text
    assert "'train/dog/002.png' shows (another file with the same pixels)" in message(report, "val/dog/same.bmp")
    text = message(report, "train/dog/other.png")
    assert "'train/cat/001.png' shows" in text
    assert "under class 'dog' instead of 'cat'" in text


def test_faults_of_names_and_folders_are_all_found(pets: Path) -> None:
    (pets / "train/eel").mkdir()
    (pets / "train/cat/list.txt").write_text("x")
    (pets / "train/dog/more.zip").write_bytes(b"")
    noise(9, 9, 3).save(pets / "val/lost.png")
    (pets / "more").mkdir()
    noise(9, 9, 3, seed=1).save(pets / "more/beside.png")
    (pets / "test").mkdir()
    (pets / "train/cat/000.png").write_bytes(b"")
    report = check_data(pets)
    assert ("warning", "names and folders", "train/cat/list.txt") in found(report)
    assert {file for severity, _, file in found(report) if severity == "error"} == {
        "train/eel",
        "train/dog/more.zip",
        "val/lost.png",
        "val/eel",
        "more/beside.png",
        "test",
        "train/cat/000.png",
    }
    assert report.counts["train"] == {"cat": 4, "dog": 4, "eel": 0}
    with pytest.raises(DataError, match=r"pets: 'train/dog/more\.zip' is an archive inside"):
        open_source(pets, "train")


def test_every_class_too_small_to_be_split_is_named_once(make_tree: Tree) -> None:
    report = check_data(make_tree("pets", {"cat": 1, "dog": 2, "eel": 3}))
    assert found(report) == {
        ("error", "names and folders", "cat"),
        ("error", "names and folders", "dog"),
        ("warning", "class balance", "cat"),
    }
    assert len(report.findings) == 3


def test_class_balance(make_tree: Tree) -> None:
    report = check_data(
        make_tree("pets", {"train/a": 1, "train/b": 2, "train/c": 20, "val/a": 1, "val/b": 1, "val/c": 1})
    )
    assert found(report) == {("warning", "class balance", "a")}
    assert [finding.message.partition(".")[0] for finding in report.findings] == [
        "class 'a' has a single training image"
    ]
    report = check_data(make_tree("more", {"train/b": 2, "train/c": 21, "val/b": 1, "val/c": 1}))
    assert "class 'c' has 21 training images, class 'b' 2" in message(report, "b")
    report = check_data(make_tree("even", {"train/b": 2, "train/c": 20, "val/b": 1, "val/c": 1}))
    assert report.findings == ()


def test_images_and_masks_are_no_classes(street: Path) -> None:
    text = "the folders 'images' and 'masks' are images and their masks, not classes. .* --task segment"
    assert re.match(text.replace(" --", r" \(--"), message(check_data(street), ""))
    with pytest.raises(DataError, match=f"street: {text.replace(' --', ' .--')}"):
        open_source(street, "train")


def test_no_split_to_train_or_to_validate_on(make_tree: Tree) -> None:
    report = check_data(make_tree("pets", {"test/cat": 2, "test/dog": 2}))
    assert [finding.message.partition(",")[0] for finding in report.findings] == [
        "there is no split 'train'",
        "there is no split 'val'",
    ]


def test_an_archive_within_and_instead_of_an_archive(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    report = check_data(tmp_path / "bad.zip")
    assert found(report) == {("error", "unreadable", "")}
    assert "cannot be read as a zip archive" in message(report, "")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", b"")
        archive.writestr("../out.png", b"")
    report = check_data(tmp_path / "outer.zip")
    assert {file for _, _, file in found(report)} == {"inner.zip", "../out.png", ""}
    assert "no images found" in message(report, "")


def test_what_may_not_be_read(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions as a user without privileges meets them, whoever runs this test."""
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "002.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    report = check_data(pets)
    assert found(report) == {("error", "broken image", f"{folder}/002.png") for folder in ("train/cat", "train/dog")}
    assert message(report, "train/cat/002.png") == "the file cannot be read (Permission denied)."


def test_a_folder_that_may_not_be_listed(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcenet.data import files

    walk = files.os.walk

    def walk_without_dogs(top: Path, *, onerror: Callable[[OSError], None], followlinks: bool) -> object:
        for folder, subfolders, names in walk(top, onerror=onerror, followlinks=followlinks):
            if Path(folder) == pets / "val/dog":
                onerror(PermissionError(13, "Permission denied", folder))
            else:
                yield folder, subfolders, names

    monkeypatch.setattr(files.os, "walk", walk_without_dogs)
    report = check_data(pets)
    assert ("error", "unreadable", "val/dog") in found(report)
    assert report.counts["train"] == {"cat": 4, "dog": 4}
    with pytest.raises(DataError, match=r"pets: the folder 'val/dog' cannot be read \(Permission denied\)"):
        open_source(pets, "train")


# --- segmentation ---


def test_a_sound_set_of_masks(street: Path) -> None:
    """Every mask has 12 x 8 pixels, a third of them of each class."""
    report = check_data(street, "segment")
    assert report.findings == ()
    assert report.classes == ("0", "1", "2")
    assert report.images == {"train": 4, "val": 2}
    assert report.counts == {"train": dict.fromkeys("012", 128), "val": dict.fromkeys("012", 64)}
    assert report.mask_values == dict.fromkeys(range(3), 192)
    assert report.shares == pytest.approx(dict.fromkeys("012", 1 / 3))
    for sample in report.samples:
        assert np.array_equal(np.asarray(sample.image).argmax(2), np.asarray(sample.mask))
    assert len(report.samples) == 4


def test_faulty_masks_are_all_named(street: Path) -> None:
    masks = street / "train/masks"
    Image.new("RGB", (12, 8)).save(masks / "000.png")
    Image.new("L", (8, 12)).save(masks / "001.png")
    (masks / "002.png").write_bytes(b"")
    Image.new("L", (12, 8), 9).save(street / "val/masks/000.png")
    (street / "val/masks/001.png").rename(street / "val/masks/alone.png")
    (masks / "notes.jpg").write_bytes(b"")
    report = check_data(street, "segment")
    reasons = {
        "train/masks/000.png": "RGB",
        "train/masks/001.png": "8 x 12",
        "train/masks/002.png": "empty",
        "train/masks/notes.jpg": "no PNG",
        "val/masks/000.png": "value(s) 9",
        "val/masks/alone.png": "no image",
        "val/images/001.png": "no mask",
    }
    errors = {finding.file: finding.message for finding in report.findings if finding.severity == "error"}
    assert set(errors) == set(reasons)
    for file, reason in reasons.items():
        assert reason in errors[file]


def test_classes_and_values_of_masks(street: Path, tmp_path: Path) -> None:
    report = check_data(street, "segment", classes=["sky", "road", "car", "bus"], ignore_index=1)
    assert report.classes == ("sky", "car", "bus")
    assert report.counts["train"] == {"sky": 128, "car": 128, "bus": 0}
    assert found(report) == {("warning", "class balance", "bus"), ("warning", "pixels that do not count", "")}
    assert report.ignored == {"train": 128, "val": 64}
    report = check_data(street, "segment", classes=["sky", "road"])
    assert {finding.file for finding in report.findings} == {
        f"{split}/masks/{index:03}.png" for split, count in (("train", 4), ("val", 2)) for index in range(count)
    }
    report = check_data(street, "segment", classes=[str(number) for number in range(5)])
    assert ("warning", "class balance", "") in found(report)  # 4 images for 5 classes
    report = check_data(street, "segment", classes=["sky", "sky"])
    assert found(report) == {("error", "classes", "")}
    with pytest.raises(DataError, match="ignore_index must be a mask value from 0 to 255, not 300"):
        check_data(street, "segment", ignore_index=300)


def test_a_rare_class_of_pixels(street: Path) -> None:
    """The 4 masks have 384 pixels: 2 beside 382 are rare, with a ratio over 100, and 4 beside 380 are not."""
    for index in range(4):
        Image.new("L", (12, 8)).save(street / f"train/masks/{index:03}.png")
    mask = np.zeros((8, 12), np.uint8)
    for pixels, rare in ((2, True), (4, False)):
        mask[0, :pixels] = 1
        Image.fromarray(mask).save(street / "train/masks/000.png")
        findings = found(check_data(street, "segment", classes=["a", "b", "c"]))
        assert (("warning", "class balance", "b") in findings) is rare


# --- what is no data set, and the quick part ---


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        check_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"'digits' comes with the program .*'\./digits'"):
        check_data("digits")


def test_the_quick_part_reads_some_images_and_counts_the_rest(pets: Path, street: Path) -> None:
    sources = {split: open_source(pets, split) for split in ("train", "val")}
    assert quick_check(sources) == []
    (pets / "val/dog/001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'val/dog/001\.png': the file cannot be read as an image"):
        quick_check(sources)
    sources = {split: open_segmentation_source(street, split) for split in ("train", "val")}
    assert quick_check(sources) == []
    Image.new("L", (12, 8), 9).save(street / "val/masks/001.png")
    with pytest.raises(DataError, match=r"'val/masks/001\.png': the mask has the value\(s\) 9"):
        quick_check(sources)


def test_the_quick_part_is_quick() -> None:
    images, labels = np.zeros((1, 8, 8), np.uint8), [0] * 49_999 + [1]
    source = ArraySource("big", "train", ["a", "b"], images, labels, range(50_000))
    source.labels = labels
    source._indices = [0] * 50_000
    start = time.perf_counter()
    findings = quick_check({"train": source})
    assert time.perf_counter() - start < 1
    assert [finding.file for finding in findings] == ["b"]
