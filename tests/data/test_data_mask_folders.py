"""Which image belongs to which mask and split, from names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest

from pcenet.data.base import DataError, faultless
from pcenet.data.mask_folders import PairLayout, find_pairs


def read_pairs(names: Iterable[str], where: str) -> PairLayout:
    return faultless(find_pairs(names), where)


def both(*stems: str, prefix: str = "") -> list[str]:
    return [f"{prefix}{name}" for stem in stems for name in (f"images/{stem}.jpg", f"masks/{stem}.png")]


def keys(names: list[str], split: str) -> list[str]:
    return [pair.key for pair in read_pairs(names, "set").select(split, "set")]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL"])
@pytest.mark.parametrize("top", ["", "camvid/"])
def test_split_folders_with_or_without_a_folder_around_them(val: str, top: str) -> None:
    names = [*both("b", "deep/a", prefix=f"{top}train/"), *both("c", prefix=f"{top}{val}/"), f"{top}classes.txt"]
    layout = read_pairs(reversed(names), "set")
    assert layout.splits == {
        "train": [
            (f"{top}train/images/b.jpg", f"{top}train/masks/b.png", "b"),
            (f"{top}train/images/deep/a.jpg", f"{top}train/masks/deep/a.png", "deep/a"),
        ],
        "val": [(f"{top}{val}/images/c.jpg", f"{top}{val}/masks/c.png", "c")],
    }
    assert layout.classes_file == f"{top}classes.txt"
    with pytest.raises(DataError, match=r"no split 'test', only train, val\. .*add images for 'test'"):
        layout.select("test", "set")


@pytest.mark.parametrize("top", ["", "camvid/"])
def test_folders_of_splits_may_lie_within(top: str) -> None:
    names = [f"{top}{kind}" for stem in ("train/a", "train/deep/b", "Valid/c") for kind in both(stem)]
    layout = read_pairs([*names, f"{top}classes.txt"], "set")
    assert {split: [pair.key for pair in pairs] for split, pairs in layout.splits.items()} == {
        "train": ["a", "deep/b"],
        "val": ["c"],
    }
    assert layout.splits["val"][0].mask == f"{top}masks/Valid/c.png"
    assert layout.classes_file == f"{top}classes.txt"
    assert [note.text for note in layout.notes] == ["folders are read as splits by their names: 'Valid' as val."]
    with pytest.raises(DataError, match=r"'images/val/a\.jpg' has no mask: there is no 'masks/val/a\.png'"):
        read_pairs([*both("train/a", "val/b"), "images/val/a.jpg"], "set")


@pytest.mark.parametrize("stems", [("train/a", "b"), ("train/a", "night/b"), ("val/a", "val/b")])
def test_within_images_other_folders_are_no_splits(stems: tuple[str, ...]) -> None:
    more = [f"{stem}{number}" for stem in stems for number in range(10)]
    assert set(read_pairs(both(*more), "set").splits) == {"train"}


@pytest.mark.parametrize("prefix", ["", "camvid/", "train/", "camvid/train/"])
def test_a_set_without_splits_is_split_by_the_rank_of_the_hashed_names(prefix: str) -> None:
    stems = [f"{number:02}" for number in range(20)]
    ranked = sorted(stems, key=lambda stem: hashlib.sha256(stem.encode()).hexdigest())
    names = both(*stems, prefix=prefix)
    assert keys(names, "val") == sorted(ranked[:2])
    assert keys(names, "test") == sorted(ranked[2:4])
    assert keys(names, "train") == sorted(ranked[4:])


def test_files_that_are_no_data_are_passed_over() -> None:
    litter = ["README.md", "train/list.txt", "train/boxes/a.csv"]
    names = [*both("a", prefix="train/"), *both("b", prefix="val/")]
    assert read_pairs([*names, *litter, "train/images/"], "set") == read_pairs(names, "set")


FAULTS = {
    "nothing": (["a.jpg"], ["no folders images and masks", "images/NAME.jpg", ".png"]),
    "no masks": (["train/images/a.jpg", "train/labels/a.png"], ["no folder 'train/masks'"]),
    "no images": (["masks/a.png"], ["no folder 'images'"]),
    "image alone": ([*both("a"), "images/b.jpg"], ["'images/b.jpg' has no mask", "'masks/b.png'"]),
    "mask alone": ([*both("a"), "masks/b.png"], ["'masks/b.png' has no image", "'images'"]),
    "empty": ([*both("a", prefix="train/"), "val/images/", "val/masks/"], ["'val/images' holds no image"]),
    "JPEG mask": ([*both("a"), "images/b.jpg", "masks/b.jpg"], ["'masks/b.jpg' is no PNG"]),
    "unread format": ([*both("a"), "images/b.heic"], ["'images/b.heic' looks like an image, but .heic files"]),
    "two of a name": ([*both("a"), "images/a.png"], ["'images/a.png' and 'images/a.jpg'", "suffix"]),
    "archive": ([*both("a", prefix="train/"), "val.zip"], ["'val.zip' is an archive"]),
    "archive alone": (["data/all.zip"], ["'data/all.zip' is an archive"]),
    "twice val": ([*both("a", prefix="val/"), *both("a", prefix="valid/")], ["'val', 'valid'"]),
    "beside": ([*both("a", prefix="train/"), "more/b.jpg"], ["'more/b.jpg' lies beside"]),
}


@pytest.mark.parametrize(("names", "parts"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_tree_is_refused_by_name(names: list[str], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(names, "street.zip")
    for part in ["street.zip: ", *parts]:
        assert part in str(caught.value)


def test_all_faults_are_found_and_the_sound_pairs_kept() -> None:
    layout, faults = find_pairs([*both("a"), "images/b.jpg", "masks/c.png", "images/d.heic", "old.zip"])
    assert [pair.key for pair in layout.splits["train"]] == ["a"]
    assert sorted(fault.file for fault in faults) == ["images/b.jpg", "images/d.heic", "masks/c.png", "old.zip"]


def test_too_few_images_to_split() -> None:
    with pytest.raises(DataError, match=r"set has 2 image\(s\), too few to give train, val, test one each"):
        keys(both("a", "b"), "train")


@pytest.mark.parametrize("folders", [("Images", "Masks"), ("IMAGES", "masks"), ("images", "MASKS")])
@pytest.mark.parametrize("prefixes", [("",), ("Training/", "Testing/"), ("top/train_set/", "top/test_set/")])
def test_images_and_masks_in_any_case(folders: tuple[str, str], prefixes: tuple[str, ...]) -> None:
    images, masks = folders
    names = [f"{prefix}{name}" for prefix in prefixes for name in (f"{images}/a.JPG", f"{masks}/a.PNG")]
    layout = read_pairs(names, "set")
    assert layout.splits == {
        split: [(f"{prefix}{images}/a.JPG", f"{prefix}{masks}/a.PNG", "a")]
        for split, prefix in zip(("train", "test"), prefixes, strict=False)
    }
    said = [note.text for note in layout.notes]
    folder = [prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes]
    expected = f"folders are read as splits by their names: '{folder[0]}' as train, '{folder[-1]}' as test."
    assert said == ([expected] if len(prefixes) == 2 else [])


def test_beside_images_and_masks_dev_is_any_folder() -> None:
    names = both("a", "b", "c")
    assert read_pairs([*names, "dev/x.jpg", "eval/images/x.jpg"], "set") == read_pairs(names, "set")


@pytest.mark.parametrize("folder", ["labels", "Annotations", "mask", "SegmentationClass", "gt"])
def test_a_folder_of_masks_by_another_name_is_hinted_at(folder: str) -> None:
    for prefix in ("", "train/"):
        with pytest.raises(DataError, match=f"no folder '{prefix}masks'.* Is it '{folder}'. Call it 'masks'"):
            read_pairs([f"{prefix}images/a.jpg", f"{prefix}{folder}/a.png"], "set")
    with pytest.raises(DataError, match=r"no folder 'images'.* Is it 'img'\? Call it 'images'"):
        read_pairs(["img/a.jpg", f"{folder}/a.png"], "set")


def test_an_image_and_its_mask_may_be_written_in_two_unicode_forms() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    names = [f"images/{decomposed}.jpg", f"masks/{composed}.png"]
    assert read_pairs(names, "set").splits["train"] == [(*names, decomposed)]
    (fault,) = find_pairs([*names, f"images/{composed}.jpg"])[1]
    assert "differ in Unicode form alone" in fault.text


def test_a_mask_whose_name_differs_in_case_is_hinted_at() -> None:
    texts = [fault.text for fault in find_pairs(["images/A1.jpg", "masks/a1.png"])[1]]
    assert [text.partition(" There is ")[2] for text in texts] == [
        "'a1', which differs in case: rename one of them.",
        "'A1', which differs in case: rename one of them.",
    ]


def test_files_that_are_no_images_are_counted_and_left_out() -> None:
    names = both("a", "b", prefix="train/")
    layout = read_pairs([*names, "train/images/notes.txt", "train/masks/legend.json"], "set")
    assert layout.splits == read_pairs(names, "set").splits
    (note,) = layout.notes
    assert note.text.startswith(
        "2 file(s) in folders of images and masks are not named like images and are left out, the first"
        " 'train/images/notes.txt'."
    )


def test_an_image_whose_name_is_no_text_is_named() -> None:
    name = "images/" + b"\xe9.jpg".decode(errors="surrogateescape")
    faults = find_pairs([*both("a"), name])[1]
    assert [fault.file for fault in faults] == [name]
    assert "is no valid Unicode" in faults[0].text
