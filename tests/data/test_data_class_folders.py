"""Which files belong to which class and split, from names alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

import pytest

from pcenet.data.base import DataError, faultless
from pcenet.data.class_folders import Layout, find_layout
from pcenet.data.splits import hold_out
from pcenet.data.tree import IMAGE_SUFFIXES


def read_layout(names: Iterable[str], where: str) -> Layout:
    return faultless(find_layout(names), where)


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


@pytest.mark.parametrize("inner", ["train", "animals"])
def test_splits_with_one_more_folder_around_the_classes(inner: str) -> None:
    """As archives have them that were packed twice."""
    names = [f"train/{inner}/{name}" for name in flat(cat=3, dog=3)] + ["test/cat/9.jpg", "test/dog/8.jpg"]
    layout = read_layout(names, "set")
    assert layout.classes == ("cat", "dog")
    assert [item.name for item in layout.splits["test"]] == ["test/cat/9.jpg", "test/dog/8.jpg"]
    assert [(item.key, item.label) for item in layout.splits["train"]][:1] == [("cat/0.jpg", 0)]
    assert len(layout.splits["train"]) == 6
    assert layout.notes == ()


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


# --- names of splits ---


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Testing"),
        ("training_set", None, "test_set"),
        ("TRAIN", "Dev", "TEST"),
        ("train", "evaluation", "testing"),
        ("trainset", "devset", "testset"),
        ("train-data", "validation data", "test-data"),
        ("Train_Set", "Valid_Set", "Test_Set"),
        ("training", "eval", None),
        ("train_images", "val-images", "test images"),
    ],
)
@pytest.mark.parametrize("top", ["", "photos/"])
def test_the_usual_names_of_splits(top: str, train: str, val: str | None, test: str | None) -> None:
    folders = {"train": train, "val": val, "test": test}
    there = {split: folder for split, folder in folders.items() if folder}
    names = [f"{top}{folder}/{name}" for folder in there.values() for name in flat(cat=10, dog=10)]
    layout = read_layout(names, "set")
    assert layout.classes == ("cat", "dog")
    assert {split: len(items) for split, items in layout.splits.items()} == dict.fromkeys(there, 20)
    for split, folder in there.items():
        assert all(item.name.startswith(f"{top}{folder}/") for item in layout.splits[split])
    (note,) = layout.notes
    read = [f"'{folder}' as {split}" for split, folder in there.items() if folder.lower() != split]
    assert note.text == f"folders are read as splits by their names: {', '.join(read)}."
    assert len(layout.select("val", "set")) == (20 if val else 2)  # 10 % of 10, of each class


def test_nothing_is_said_of_plain_names() -> None:
    names = [f"{split}/{name}" for split in ("Train", "val", "TEST") for name in flat(cat=1, dog=1)]
    assert read_layout(names, "set").notes == ()


@pytest.mark.parametrize(
    "names",
    [
        flat(bus=4, train=4),  # vehicles
        flat(testing=4, math=4, dev=4),  # subjects
        [f"dev/{name}" for name in flat(cat=4, dog=4)],  # any folder around a set
        [f"Testing/{name}" for name in flat(cat=4, dog=4)],
        [f"{name}/{deep}/{index}.jpg" for name in ("cat", "dog") for deep in ("images",) for index in range(4)],
        [f"{name}/{name}{number}/{index}.jpg" for name in ("cat", "dog") for number in (1, 2) for index in range(4)],
        [f"train/{name}/{year}/{index}.jpg" for name in ("cat", "dog") for year in (1, 2) for index in range(4)],
        [*flat(cat=4, dog=4), "cat/old/1.jpg", "cat/new/1.jpg", "dog/old/1.jpg", "dog/new/1.jpg"],
        [f"{number}/{side}/{index}.jpg" for number in range(11) for side in ("left", "right") for index in range(2)],
    ],
)
def test_what_may_look_like_splits_and_is_none(names: list[str]) -> None:
    layout = read_layout(names, "set")
    assert list(layout.splits) == ["train"]
    assert layout.notes == ()
    level = 1 if names[0].startswith(("dev/", "Testing/", "train/c")) else 0
    assert list(layout.classes) == sorted({name.split("/")[level] for name in names})


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            [f"{part}/{name}" for part in ("A", "B") for name in flat(cat=3, dog=3)],
            ["the folders 'A', 'B' hold the same folders, 'cat', 'dog'", "train, val and test", "folder 'train'"],
        ),
        (
            [*(f"train2017/{name}" for name in flat(cat=3, dog=3, frog=3)), "val2017/cat/9.jpg", "val2017/dog/9.jpg"],
            ["the folders 'train2017', 'val2017' hold the same folders, 'cat', 'dog'"],
        ),
        (
            [f"set/fold{number}/{name}" for number in range(5) for name in flat(cat=3, dog=3)],
            ["'fold0', 'fold1', 'fold2', 'fold3', 'fold4' hold the same folders, 'cat', 'dog'"],
        ),
        (
            [f"{part}/{name}" for part in ("mine", "yours") for name in flat(a=1, b=1, c=1, d=1, e=1, f=1)],
            ["the same folders, 'a', 'b', 'c', 'd', 'e', ..."],
        ),
        ([f"{part}/{name}" for part in ("train", "dev", "val") for name in flat(a=1, b=1)], ["'dev', 'val'", "mean"]),
        ([f"{part}/{name}" for part in ("Training", "Train") for name in flat(a=1, b=1)], ["'Train', 'Training'"]),
        (
            [*(f"{part}/{name}" for part in ("Training", "Testing") for name in flat(a=1, b=1)), "more/1.jpg"],
            ["'more/1.jpg' lies beside the split folders 'Testing', 'Training'"],
        ),
        (["Training/1.jpg", "Testing/2.jpg"], ["'Training': it holds images, such as 'Training/1.jpg', but no class"]),
        (["Training/a/1.jpg", "Training/b/1.jpg", "Testing/a/1.jpg"], ["split 'test' has no folder for class 'b'"]),
        (
            [
                *(f"{part}/{part}/{name}" for part in ("seg_train", "seg_test") for name in flat(sea=3, street=3)),
                *("seg_pred/seg_pred/1.jpg", "seg_pred/seg_pred/2.jpg"),
            ],
            ["the folders 'seg_test/seg_test', 'seg_train/seg_train' hold the same folders, 'sea', 'street'"],
        ),
    ],
)
def test_what_contradicts_the_guess_is_refused(names: list[str], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_layout(names, "set")
    for part in parts:
        assert part in str(caught.value)


# --- images and masks ---


@pytest.mark.parametrize("folders", [("images", "masks"), ("Images", "MASKS"), ("img", "labels"), ("JPEGImages", "gt")])
@pytest.mark.parametrize("prefixes", [("",), ("street/",), ("train/", "val/")])
def test_images_and_masks_are_no_classes(folders: tuple[str, str], prefixes: tuple[str, ...]) -> None:
    names = [f"{prefix}{folder}/{index}.png" for prefix in prefixes for folder in folders for index in range(4)]
    with pytest.raises(DataError, match=r"are images and their masks, not classes\. .*--task segment"):
        read_layout(names, "set")


def test_masks_that_are_named_after_their_images_folder_are_no_class() -> None:
    names = [f"{folder}/{index}.png" for folder in ("Train", "train_masks") for index in range(4)]
    with pytest.raises(DataError, match=r"the folders 'Train' and 'train_masks' are images and their masks"):
        read_layout(names, "set")
    assert read_layout(flat(with_mask=4, without_mask=4), "set").classes == ("with_mask", "without_mask")


@pytest.mark.parametrize(
    "names",
    [
        ["images/a.jpg", "images/b.jpg", "images/c.jpg", "labels/x.jpg", "labels/y.jpg", "labels/z.jpg"],
        flat(gloves=4, masks=4, hats=4),
        flat(image=4, figure=4),
    ],
)
def test_classes_may_have_such_names(names: list[str]) -> None:
    assert len(read_layout(names, "set").classes) in (2, 3)


# --- Unicode ---

COMPOSED, DECOMPOSED = "Caf\u00e9", "Cafe\u0301"


def test_a_class_is_the_same_in_either_unicode_form() -> None:
    names = [f"train/{name}/{index}.jpg" for name in ("Cafz", COMPOSED) for index in range(2)]
    names += [f"val/{name}/{index}.jpg" for name in ("Cafz", DECOMPOSED) for index in range(2)]
    layout = read_layout(names, "set")
    assert layout.classes == ("Cafz", COMPOSED)  # as training spells it, and in the order of that
    assert [(item.name, item.label) for item in layout.splits["val"]] == [
        ("val/Cafz/0.jpg", 0),
        ("val/Cafz/1.jpg", 0),
        (f"val/{DECOMPOSED}/0.jpg", 1),
        (f"val/{DECOMPOSED}/1.jpg", 1),
    ]


def test_a_set_in_decomposed_form_keeps_its_class_numbers() -> None:
    names = [f"{name}/{index}.jpg" for name in ("Cafz", DECOMPOSED) for index in range(3)]
    assert read_layout(names, "set").classes == (DECOMPOSED, "Cafz")


@pytest.mark.parametrize(
    ("one", "other", "aspect"),
    [(COMPOSED, DECOMPOSED, "Unicode form"), ("red fox", "red  fox", "white space"), ("cat", "cat ", "white space")],
)
def test_two_classes_of_one_look_are_one_finding(one: str, other: str, aspect: str) -> None:
    names = [f"{name}/{index}.jpg" for name in ("dog", one, other) for index in range(4)]
    _, faults = find_layout(names)
    (fault,) = faults
    assert f"'{one}'" in fault.text
    assert f"'{other}'" in fault.text
    assert f"look alike and differ in {aspect} only" in fault.text


@pytest.mark.parametrize(("there", "aspect"), [("Cat", "case"), ("cat ", "white space")])
def test_a_class_that_a_split_has_under_nearly_the_same_name(there: str, aspect: str) -> None:
    names = [f"train/{name}/1.jpg" for name in ("cat", "dog")] + [f"val/{name}/1.jpg" for name in (there, "dog")]
    texts = [fault.text for fault in find_layout(names)[1]]
    assert any("'val' has no folder for class 'cat'" in text and f"'{there}', which differs in {aspect}" in text
               for text in texts)  # fmt: skip


def test_names_that_are_no_text_are_named_once() -> None:
    bad_class, bad_file = (name.decode(errors="surrogateescape") for name in (b"h\xf6rse", b"\xe9.jpg"))
    names = [*flat(cat=4, dog=4), f"{bad_class}/1.jpg", f"{bad_class}/2.jpg", f"cat/{bad_file}", f"cat/{bad_file}.txt"]
    layout, faults = find_layout(names)
    assert [fault.file for fault in faults] == [bad_class, f"cat/{bad_file}"]
    assert all("is no valid Unicode" in fault.text for fault in faults)
    assert layout.classes == ("cat", "dog")


# --- folders and files that are not where, or what, they should be ---


def test_a_class_folder_instead_of_the_folder_around_it() -> None:
    names = [f"{index}.jpg" for index in range(35)]
    _, faults = find_layout(names, "pictures")
    assert [fault.file for fault in faults] == [""]
    assert faults[0].text.startswith("it holds images, such as '0.jpg', but no class folders")
    assert faults[0].text.endswith("Did you mean the folder around it, 'pictures'?")
    assert "Did you mean" not in find_layout(names)[1][0].text


STRAY = ["cat/notes.txt", "cat/README", "dog/labels.csv", "dog/1.jpg.part", "dog/deep/x.json"]


def test_files_that_are_no_images_are_counted_and_left_out() -> None:
    names = flat(cat=4, dog=4)
    layout = read_layout([*names, *STRAY, "readme.md"], "set")
    assert layout.splits == read_layout(names, "set").splits
    (note,) = layout.notes
    assert note.text.startswith(
        "5 file(s) in class folders are not named like images and are left out, the first 'cat/README'."
    )


@pytest.mark.parametrize(
    "name", ["a.heic", "a.HEIC", "a.avif", "a.CR2", "a.raw", "a.jp2", "a.jxl", "a.nii.gz", "a.npy"]
)
def test_images_in_formats_that_are_not_read_are_not_lost_in_silence(name: str) -> None:
    suffix = name.lower().removeprefix("a")
    with pytest.raises(
        DataError, match=rf"'cat/{name}' looks like an image, but {suffix} files are not read: .*Convert"
    ):
        read_layout([*flat(cat=4, dog=4), f"cat/{name}"], "set")
    with pytest.raises(DataError, match=f"'cat/{name}' looks like"):
        read_layout([f"cat/{name}", f"dog/{name}"], "set")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_images_in_formats_that_are_read_count_in_any_case(suffix: str) -> None:
    names = [f"{name}/{index}{suffix.upper()}" for name in ("cat", "dog") for index in range(3)]
    assert len(read_layout(names, "set").splits["train"]) == 6
