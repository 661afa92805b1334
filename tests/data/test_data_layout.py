"""Which files belong to which class and split, from names alone."""

from __future__ import annotations

import hashlib
import random

import pytest

from pcenet.data.base import DataError
from pcenet.data.layout import read_layout
from pcenet.data.splits import hold_out


def flat(**counts: int) -> list[str]:
    return [f"{name}/{index}.jpg" for name, count in counts.items() for index in range(count)]


def select(names: list[str], split: str) -> list[tuple[str, int]]:
    return [(item.name, item.label) for item in read_layout(names, "set").select(split, "set")]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL"])
@pytest.mark.parametrize("top", ["", "photos/", "train/"])
def test_split_folders_with_or_without_a_folder_around_them(val: str, top: str) -> None:
    files = {"train": ["dog/2.JPG", "cat/deep/9.png", "cat/1.jpeg"], val: ["cat/1.jpg", "dog/1.jpg"]}
    files["test"] = ["dog/7.webp", "cat/8.jpg"]
    names = [f"{top}{part}/{name}" for part, below in files.items() for name in below]
    assert read_layout(names, "set").classes == ("cat", "dog")
    assert select(names, "train") == [
        (f"{top}train/cat/1.jpeg", 0),
        (f"{top}train/cat/deep/9.png", 0),
        (f"{top}train/dog/2.JPG", 1),
    ]
    assert select(names, "val") == [(f"{top}{val}/cat/1.jpg", 0), (f"{top}{val}/dog/1.jpg", 1)]
    assert select(names, "test") == [(f"{top}test/cat/8.jpg", 0), (f"{top}test/dog/7.webp", 1)]


def test_a_class_may_be_called_train() -> None:
    layout = read_layout(flat(bus=3, train=3), "set")
    assert layout.classes == ("bus", "train")
    names = [f"train/{name}" for name in flat(bus=3, train=3)]
    assert read_layout(names, "set").classes == ("bus", "train")


@pytest.mark.parametrize("prefix", ["", "top/", "train/", "top/train/"])
def test_a_set_without_splits_is_split_80_10_10_in_every_class(prefix: str) -> None:
    names = [prefix + name for name in flat(cat=20, dog=10, eel=15, fox=14, gnu=3)]
    split = {part: select(names, part) for part in ("train", "val", "test")}
    # 10 % of 20, 10, 15, 14, 3, halves rounded up, at least 1
    held_out = [2, 1, 2, 1, 1]
    for part in ("val", "test"):
        assert [sum(label == number for _, label in split[part]) for number in range(5)] == held_out
    assert [sum(label == number for _, label in split["train"]) for number in range(5)] == [16, 8, 11, 12, 1]
    assert sorted(name for part in split.values() for name, _ in part) == sorted(names)
    assert split["train"] == sorted(split["train"], key=lambda item: (item[1], item[0]))
    assert [name.removeprefix(prefix) for name, _ in split["val"]] == [
        name for name, _ in select(flat(cat=20, dog=10, eel=15, fox=14, gnu=3), "val")
    ]


def test_the_split_is_the_rank_of_the_hashed_name_and_no_chance() -> None:
    names = flat(cat=20, dog=20)
    ranked = sorted(names[:20], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert sorted(name for name, label in select(names, "val") if label == 0) == sorted(ranked[:2])
    assert sorted(name for name, label in select(names, "test") if label == 0) == sorted(ranked[2:4])
    shuffled = random.Random(0).sample(names, len(names))
    for part in ("train", "val", "test"):
        assert select(shuffled, part) == select(names, part)


def test_an_added_image_leaves_the_others_in_their_split() -> None:
    before, after = flat(cat=30, dog=30), flat(cat=31, dog=30)
    for part in ("val", "test"):
        assert len(set(select(before, part)) - set(select(after, part))) <= 1


def test_val_is_held_out_of_train_where_only_test_comes_apart() -> None:
    names = [f"{part}/{name}" for part in ("train", "test") for name in flat(cat=10, dog=20)]
    assert [label for _, label in select(names, "val")] == [0, 1, 1]
    assert all(name.startswith("train/") for name, _ in select(names, "val"))
    assert not {*select(names, "val")} & {*select(names, "train")}
    assert len(select(names, "train")) == 27
    assert len(select(names, "test")) == 30


def test_nothing_is_taken_from_train_where_val_exists() -> None:
    names = [f"{part}/{name}" for part in ("train", "val") for name in flat(cat=5, dog=5)]
    assert len(select(names, "train")) == len(select(names, "val")) == 10
    with pytest.raises(DataError, match=r"set: there is no split 'test', only train, val\."):
        select(names, "test")


def test_a_test_set_alone_can_be_evaluated_but_not_trained_on() -> None:
    names = [f"test/{name}" for name in flat(cat=5, dog=5)]
    assert len(select(names, "test")) == 10
    with pytest.raises(DataError, match="no split 'train', only test"):
        select(names, "train")


def test_files_that_are_no_data_are_passed_over() -> None:
    names = flat(cat=4, dog=4)
    assert select([*names, "README.md", "cat/", "dog/"], "train") == select(names, "train")
    beside = [f"train/{name}" for name in names]
    assert select([*beside, "labels/boxes.csv", "train/list.txt"], "train") == select(beside, "train")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["no images found", "folder per class", ".png"]),
        (["cat/1.txt", "readme.txt"], ["no images found"]),
        (flat(cat=9), ["only one class", "'cat'", "two or more"]),
        ([*flat(cat=3, dog=3), "eel/"], ["'eel'", "holds no image"]),
        ([*flat(cat=3, dog=3), "1.jpg"], ["'1.jpg'", "no class folder"]),
        (["train/1.jpg", "test/2.jpg"], ["'train/1.jpg'", "no class folder"]),
        (["train/cat/1.jpg", "train/dog/1.jpg", "more/cat/1.jpg"], ["'more/cat/1.jpg'", "beside", "'train'"]),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"], ["split 'val'", "class 'dog'", "1 of 2"]),
        (["train/cat/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"], ["split 'train'", "class 'dog'"]),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/"], ["split 'test'", "2 of 2"]),
        (
            ["train/cat/1.jpg", "train/dog/1.jpg", "val/dog/", "val/cat/1.jpg"],
            ["'val/dog'", "holds no image"],
        ),
        (["train/c/1.jpg", "val/c/1.jpg", "valid/c/1.jpg"], ["'val', 'valid'", "mean 'val'"]),
    ],
)
def test_a_faulty_tree_is_refused_by_name(names: list[str], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_layout(names, "pets.zip")
    for part in ["pets.zip: ", *parts]:
        assert part in str(caught.value)


def test_a_class_too_small_to_split_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"set: class 'dog' has 2 image\(s\), too few to give train, val, test"):
        select(flat(cat=3, dog=2), "train")
    with pytest.raises(DataError, match="class 'b' has 1 image"):
        hold_out(["x", "y", "z"], [0, 0, 1], ["val"], classes=["a", "b"], where="set")
