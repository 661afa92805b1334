"""CSV lists: what they tell, and what is wrong with which line."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet import cli
from pcenet.data import (
    DataError,
    ImageSource,
    SegmentationSource,
    check_data,
    open_segmentation_source,
    open_source,
    task_for,
)

Tree = Callable[[str, Mapping[str, int]], Path]

SPLITS = ("train", "val", "test")


def contents(source: ImageSource) -> list[tuple[int, str, bytes]]:
    return [
        (source.labels[index], source.file_name(index), source.image(index).tobytes()) for index in range(len(source))
    ]


def pairs(source: SegmentationSource) -> list[tuple[bytes, bytes]]:
    return [tuple(image.tobytes() for image in source.sample(index)) for index in range(len(source))]


@pytest.fixture
def pets(make_tree: Tree) -> Path:
    return make_tree("pets", {"cat": 10, "dog": 12})


def listed(folder: Path, *lines: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def rows_of(pets: Path) -> list[str]:
    return [f"{path.relative_to(pets).as_posix()},{path.parent.name}" for path in sorted(pets.glob("*/*.png"))]


def test_a_list_reads_like_the_folder_that_it_lists(pets: Path) -> None:
    path = listed(pets, "image,label", *rows_of(pets))
    assert task_for(path) == "classify"
    for split in SPLITS:
        from_folder, from_list = open_source(pets, split), open_source(str(path), split)
        assert from_list.classes == from_folder.classes == ("cat", "dog")
        assert contents(from_list) == contents(from_folder)
        assert from_list.name == "list.csv"


def test_columns_by_other_names_in_any_order_and_separated_otherwise(pets: Path) -> None:
    rows = [row.split(",") for row in rows_of(pets)]
    lines = [f" {label} ; 7 ; {image} " for image, label in rows]
    path = listed(pets, "\ufeffClass;comment;Filename", *lines, "", "")
    assert contents(open_source(path, "train")) == contents(open_source(pets, "train"))


def test_splits_are_those_of_the_rows(pets: Path) -> None:
    lines = [
        *("cat/000.png,cat,train", "dog/000.png,dog,Training", "cat/001.png,cat,validation", "dog/001.png,dog,val"),
        *("dog/002.png,dog,test", "cat/002.png,cat,TEST"),
    ]
    path = listed(pets, "image,label,split", *lines)
    for number, split in enumerate(SPLITS):
        source = open_source(path, split)
        assert [source.file_name(index) for index in range(2)] == [f"cat/00{number}.png", f"dog/00{number}.png"]
        assert list(source.labels) == [0, 1]
    without = listed(pets, "image,label,split", *lines[:4])
    with pytest.raises(DataError, match=r"list\.csv: there is no split 'test', only train, val\."):
        open_source(without, "test")


def test_absolute_paths_show_no_more_of_the_machine_than_they_must(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    lines = [f"{pets}/cat/{index:03}.png,cat" for index in range(4)]
    lines += [f"../pets/dog/{index:03}.png,dog" for index in range(4)]
    source = open_source(listed(tmp_path / "lists", "path,class", *lines), "train")
    assert {source.file_name(index).partition("/")[0] for index in range(len(source))} == {"cat", "dog"}
    assert source.image(0).size == (12, 12)


def test_a_quoted_path_may_hold_a_comma(pets: Path) -> None:
    os.rename(pets / "cat" / "000.png", pets / "cat" / "a, b.png")
    sources = [
        open_source(listed(pets, "image,label", '"cat/a, b.png",cat', *rows_of(pets)[:9], *rows_of(pets)[10:]), split)
        for split in SPLITS
    ]
    names = [source.file_name(index) for source in sources for index in range(len(source))]
    assert "cat/a, b.png" in names
    assert len(names) == 22


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "line 1 must name the columns: image, and label or mask, perhaps split; it has nothing"),
        (["imge,label", "cat/000.png,cat"], "it has 'imge', 'label'; did you mean 'image'?"),
        (["cat/000.png,cat"], "line 1 must name the columns"),
        (["image,path,label"], "line 1: the columns 'image' and 'path' both mean 'image'. Rename one."),
        (["image,split", "cat/000.png,train"], "line 1: there is no column 'label'."),
        (["image,mask", "cat/000.png,cat/001.png"], "no column 'label'. It has masks: the task for these is segment."),
        (["image,label", "cat/000.png,cat", "cat/999.png,cat"], "line 3: there is no file '{pets}/cat/999.png'."),
        (["image,label", "", "cat/000.png, "], "line 3: 'cat/000.png' has no label. Give it one."),
        (["image,label", ",cat"], "line 2: it names no image."),
        (["image,label", "cat/000.png"], "line 2 has 1 cells, but line 1 has 2."),
        (
            ["image,label", "a, b.png,cat"],
            "line 2 has 3 cells, but line 1 has 2. Give it as many; what holds a ',' stands in quotes.",
        ),
        (["image,label", '"cat/000.png,cat'], "line 2: unexpected end of data. Correct the quotes."),
        (["image,label", "cat/000.png,cat", "./cat/000.png,dog"], "line 3: 'cat/000.png' is in line 2, too."),
        (
            ["image,label,split", "cat/000.png,cat,tran"],
            "line 2: the split is 'tran'; it must be train, val or test; did",
        ),
        (["image,label,split", "cat/000.png,cat,"], "line 2: the split is ''; it must be train, val or test"),
        (
            ["image,label", "cat/000.heic,cat"],
            "line 2: 'cat/000.heic' looks like an image, but .heic files are not read",
        ),
        (["image,label", "cat/000.png,cat", "cat/001.png,cat"], "only one class, 'cat', was found."),
        (
            ["image,label,split", "cat/000.png,cat,train", "dog/000.png,dog,val"],
            "split 'train' has no image for class 'dog' (1 of 2 classes lack one)",
        ),
        (["image,label", "cat/000.png,cat", "dog/000.png,dog"], "class 'cat' has 1 image(s), too few to give"),
    ],
)
def test_a_fault_names_the_list_and_the_line(pets: Path, lines: list[str], fault: str) -> None:
    path = listed(pets, *lines)
    with pytest.raises(DataError) as caught:
        open_source(path, "train")
    assert str(caught.value).startswith(f"{path}: ")
    assert fault.format(pets=pets) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_no_text(pets: Path) -> None:
    path = pets / "list.csv"
    path.write_bytes("image,label\ncaf\xe9.png,cat\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.csv: the list is no text in UTF-8"):
        open_source(path, "train")
    os.remove(path)
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"list\.csv: it is no regular file"):
        open_source(path, "train")


def test_check_data_names_all_faults_at_once(pets: Path) -> None:
    (pets / "cat" / "003.png").write_bytes(b"no image")
    path = listed(pets, "image,label", *rows_of(pets), "cat/x.png,cat", "dog/y.png,dog")
    report = check_data(path)
    errors = {
        (finding.kind, finding.file): finding.message for finding in report.findings if finding.severity == "error"
    }
    assert errors.keys() == {("unreadable", "cat/x.png"), ("unreadable", "dog/y.png"), ("broken image", "cat/003.png")}
    assert errors["unreadable", "cat/x.png"].startswith("line 24: ")  # behind a title and 22 images
    assert report.images == {"train": 18, "val": 2, "test": 2}
    assert not report.usable


def test_a_check_of_a_list_that_cannot_be_read_ends_with_its_report(
    pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check-data", str(listed(pets, "label", "cat"))]) == 1
    assert "line 1 must name the columns" in " ".join(capsys.readouterr().out.split())


def test_workers_that_are_spawned_read_it(pets: Path) -> None:
    source = open_source(listed(pets, "image,label", *rows_of(pets)), "train")
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


# --- masks ---


@pytest.fixture
def street(make_pairs: Tree) -> Path:
    return make_pairs("street", {"train": 4, "val": 2})


def masked(street: Path) -> list[str]:
    found = sorted(street.glob("*/images/*.png"))
    return [
        f"{path.relative_to(street)},{path.relative_to(street).as_posix().replace('images', 'masks')},{path.parts[-3]}"
        for path in found
    ]


def test_a_list_of_masks_reads_like_the_folder(street: Path) -> None:
    path = listed(street, "image,mask,split", *masked(street))
    assert task_for(path) == "segment"
    for split in ("train", "val"):
        from_folder, from_list = open_segmentation_source(street, split), open_segmentation_source(path, split)
        assert from_list.classes == from_folder.classes == ("0", "1", "2")
        assert pairs(from_list) == pairs(from_folder)
    assert check_data(path, "segment").usable
    (street / "classes.txt").write_text("sky\nroad\ncar\n")
    assert open_segmentation_source(path, "val").classes == ("sky", "road", "car")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("train/images/000.png,,train", "line 2: 'train/images/000.png' has no mask. Give it one."),
        ("train/images/000.png,train/masks/9.png,train", "line 2: there is no file '{street}/train/masks/9.png'"),
        ("train/images/000.png,train/masks/9.jpg,train", "line 2: 'train/masks/9.jpg' is no PNG file."),
    ],
)
def test_a_fault_of_a_mask_names_the_line(street: Path, line: str, fault: str) -> None:
    path = listed(street, "image,mask,split", line, *masked(street)[1:])
    with pytest.raises(DataError) as caught:
        open_segmentation_source(path, "train")
    assert f"{path}: {fault.format(street=street)}" in str(caught.value)


def test_classes_have_no_masks(pets: Path) -> None:
    path = listed(pets, "image,label", *rows_of(pets))
    with pytest.raises(DataError, match=r"there is no column 'mask'\. It has labels: the task for these is classify"):
        open_segmentation_source(path, "train")


def test_the_images_of_a_list_differ(pets: Path) -> None:
    """That the tests above compare anything: no two of these images are the same."""
    source = open_source(listed(pets, "image,label", *rows_of(pets)), "train")
    assert len({np.asarray(source.image(index)).tobytes() for index in range(len(source))}) == len(source) == 18


def test_labels_that_look_alike_are_a_fault(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(8)]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    labels = ["cat", "dog", "cat\u200b", "dog"] * 2
    rows = [f"{name},{label},train" for name, label in zip(names, labels, strict=True)]
    path = tmp_path / "pets.csv"
    path.write_text("\n".join(["image,label,split", *rows]), encoding="utf-8")
    with pytest.raises(DataError, match=r"the classes 'cat' and 'cat.*' look alike and differ in"):
        open_source(path, "train")


def test_a_name_that_no_file_can_have_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pets.csv"
    path.write_text(f"image,label\n{'x' * 300}.png,cat\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: there is no file"):
        open_source(path, "train")
