"""Folders, archives and known sets behind one function."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from pcenet.data import SOURCE_NAMES, DataError, ImageSource, default_root, open_source, read_class_names, task_for
from pcenet.data import arrays as arrays_module
from pcenet.data.files import FolderTree, ZipTree

SPLITS = ("train", "val", "test")
Tree = Callable[[str, Mapping[str, int]], Path]
Pack = Callable[[Path], Path]


def contents(source: ImageSource) -> list[tuple[int, str, bytes]]:
    return [
        (source.labels[index], source.file_name(index), source.image(index).tobytes()) for index in range(len(source))
    ]


# --- folders and archives ---


@pytest.mark.parametrize(
    "counts",
    [
        {"cat": 10, "dog": 12},
        {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1},
    ],
)
def test_a_zip_reads_like_the_folder_it_was_made_of(make_tree: Tree, pack: Pack, counts: Mapping[str, int]) -> None:
    folder = make_tree("pets", counts)
    archive = pack(folder)
    for split in SPLITS:
        from_folder, from_zip = open_source(folder, split), open_source(str(archive), split)
        assert contents(from_folder) == contents(from_zip)
        assert from_folder.classes == from_zip.classes == ("cat", "dog")
        assert (from_folder.name, from_zip.name) == ("pets", "pets.zip")
        assert from_folder.split == from_zip.split == split
        assert from_folder.horizontal_flip
        assert from_folder.image(0).mode == "RGB"
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "pets",
        "pets.zip",
    ]  # nothing was unpacked


def test_a_folder_around_the_set_changes_no_sample(make_tree: Tree, pack: Pack) -> None:
    plain = make_tree("plain", {"cat": 10, "dog": 10})
    nested = pack(make_tree("around", {"pets/cat": 10, "pets/dog": 10}))
    for split in SPLITS:
        expected = [(label, f"pets/{name}", data) for label, name, data in contents(open_source(plain, split))]
        assert contents(open_source(nested, split)) == expected


def test_the_image_is_that_of_the_named_file(make_tree: Tree) -> None:
    folder = make_tree("pets", {"cat": 10, "dog": 10})
    source = open_source(folder, "val")
    for index in range(len(source)):
        with Image.open(folder / source.file_name(index)) as image:
            assert source.image(index).tobytes() == image.tobytes()
        assert source.classes[source.labels[index]] == source.file_name(index).split("/")[0]


def test_links_are_followed(make_tree: Tree, tmp_path: Path) -> None:
    folder = make_tree("pets", {"cat": 3, "dog": 3})
    (tmp_path / "links").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "links" / name).symlink_to(folder / name)
    assert contents(open_source(tmp_path / "links", "train")) == contents(open_source(folder, "train"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_open_archive_can_be_pickled_and_forked(make_tree: Tree, pack: Pack) -> None:
    source = open_source(pack(make_tree("pets", {"cat": 10, "dog": 10})), "train")
    expected = contents(source)  # the archive is open from here on
    assert contents(pickle.loads(pickle.dumps(source))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for read in pool.map(contents, [source, source]):
            assert read == expected
    assert contents(source) == expected


def test_a_broken_image_is_named_when_it_is_read(make_tree: Tree, pack: Pack) -> None:
    folder = make_tree("pets", {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    (folder / "train/cat/001.png").write_bytes(b"junk")
    for path in (folder, pack(folder)):
        source = open_source(path, "train")
        source.image(0)
        with pytest.raises(DataError, match=rf"^{path}: 'train/cat/001\.png': .*cannot be read as an image"):
            source.image(1)


def test_a_dangling_link_is_named(make_tree: Tree) -> None:
    folder = make_tree("pets", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    (folder / "train/cat/zzz.png").symlink_to(folder / "gone.png")
    source = open_source(folder, "train")
    with pytest.raises(DataError, match=r"train/cat/zzz\.png: the file cannot be read \(No such file"):
        source.image(1)


@pytest.mark.parametrize("name", ["../cat/1.png", "/cat/1.png", "a/../../cat/1.png", "C:/cat/1.png", "cat\\..\\1.png"])
def test_unsafe_names_in_an_archive(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("cat/0.png", b"")
        target.writestr(name, b"")
    with pytest.raises(DataError) as caught:
        open_source(archive, "train")
    assert str(caught.value).startswith(f"{archive}: unsafe name '{name}'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_later_of_two_files_of_one_name_counts(make_tree: Tree, pack: Pack) -> None:
    folder = make_tree("pets", {"cat": 3, "dog": 3})
    expected = contents(open_source(folder, "train"))
    (name,) = (name for label, name, _ in expected if label == 0)
    kept = (folder / name).read_bytes()
    (folder / name).write_bytes(b"junk")
    archive = pack(folder)
    with zipfile.ZipFile(archive, "a") as target:
        target.writestr(name, kept)
    assert contents(open_source(archive, "train")) == expected


def test_an_encrypted_archive(make_tree: Tree, pack: Pack) -> None:
    archive = pack(make_tree("pets", {"cat": 1, "dog": 1}))
    data = bytearray(archive.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" of the last entry, cat/
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"pets\.zip: 'cat/' is encrypted.*without a password"):
        open_source(archive, "train")


def test_an_archive_of_another_compression(tmp_path: Path) -> None:
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_BZIP2) as target:
        target.writestr("cat/0.png", b"0" * 100)
    with pytest.raises(DataError, match=r"'cat/0\.png' is compressed with method 12; only stored and deflated"):
        open_source(archive, "train")


def test_a_damaged_archive(make_tree: Tree, pack: Pack) -> None:
    archive = pack(make_tree("pets", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 1}))
    data = archive.read_bytes()
    archive.write_bytes(data[:-40])
    with pytest.raises(DataError, match=r"pets\.zip: cannot be read as a zip archive"):
        open_source(archive, "train")
    damaged = bytearray(data)
    damaged[data.index(b"IDAT", data.index(b"train/cat/000.png")) + 9] ^= 0xFF
    archive.write_bytes(damaged)
    source = open_source(archive, "train")
    source.image(1)
    with pytest.raises(DataError, match=r"pets\.zip: 'train/cat/000\.png' is damaged in the archive"):
        source.image(0)


# --- trees: what is listed, under which name, and what happens when it changes ---


def litter_of(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")


LITTER = [
    *("train/cat/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg", "train/@eaDir/x.jpg", "@eaDir/dog/x.jpg", "#recycle/cat/x.jpg"),
    *("train/cat/thumbs.db", "train/cat/Desktop.ini", "val/dog/Icon\r", "val/dog/._000.png", "$RECYCLE.BIN/a/x.jpg"),
    *("lost+found/x.jpg", "System Volume Information/a/x.jpg", "__MACOSX/train/cat/._000.png", ".Trashes/x.zip"),
]


def test_what_systems_leave_is_listed_in_neither_folders_nor_archives(make_tree: Tree, pack: Pack) -> None:
    folder = make_tree("pets", {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    clean = sorted(FolderTree(folder).names())
    litter_of(folder, LITTER)
    for tree in (FolderTree(folder), ZipTree(pack(folder))):
        assert sorted(tree.names()) == clean


def test_a_system_folder_that_may_not_be_read_stops_nothing(make_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found is root's alone; whoever runs this test."""
    folder = make_tree("pets", {"cat": 3, "dog": 3})
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert sorted(FolderTree(folder).names())[:2] == ["cat/", "cat/000.png"]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("./cat/1.jpg", "cat/1.jpg"),
        ("cat//1.jpg", "cat/1.jpg"),
        ("cat/./1.jpg", "cat/1.jpg"),
        ("cat\\1.jpg", "cat/1.jpg"),
        (".\\cat\\deep\\1.jpg", "cat/deep/1.jpg"),
        ("./1.jpg", "1.jpg"),
        ("./cat/", "cat/"),
    ],
)
def test_names_in_archives_are_normalised(tmp_path: Path, written: str, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("./", b"")
        archive.writestr(written, b"content" if not written.endswith("/") else b"")
    tree = ZipTree(tmp_path / "a.zip")
    assert tree.names() == [name]
    assert tree.read(name) == (b"content" if not name.endswith("/") else b"")


@pytest.mark.parametrize("other", ["./cat/1.jpg", "cat//1.jpg", "cat\\1.jpg"])
def test_two_files_of_one_normalised_name_are_a_finding(tmp_path: Path, other: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/", "./cat/", "cat/1.jpg", other):  # folders may be there twice
            archive.writestr(name, name)
    _, faults = ZipTree(tmp_path / "a.zip").listing()
    assert [fault.file for fault in faults] == ["cat/1.jpg"]
    assert f"'cat/1.jpg' and '{other}' are the same file" in faults[0].text


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "endless device"])
def test_what_is_no_regular_file_is_refused_unread(make_tree: Tree, tmp_path: Path, kind: str) -> None:
    special(kind, tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"x\.zip: it is no regular file"):
        open_source(tmp_path / "x.zip", "train")
    special(kind, tmp_path / "names.txt")
    with pytest.raises(ValueError, match=r"names\.txt: it is no regular file"):
        read_class_names(tmp_path / "names.txt")
    folder = make_tree("pets", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    special(kind, folder / "train/cat/1.png")
    with pytest.raises(DataError, match=r"train/cat/1\.png: it is no regular file"):
        open_source(folder, "train").image(1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("change", ["other names", "other pixels", "no archive", "removed"])
def test_an_archive_that_is_replaced_is_named_by_every_process_that_opens_it(
    make_tree: Tree, pack: Pack, change: str
) -> None:
    folder = make_tree("pets", {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    archive = pack(folder)
    source = open_source(archive, "train")
    copy = pickle.loads(pickle.dumps(source))
    before = contents(source)
    archive.unlink()
    if change == "other names":
        (folder / "train/cat/000.png").rename(folder / "train/cat/other.png")
        pack(folder)
    elif change == "other pixels":
        (folder / "train/cat/000.png").write_bytes((folder / "train/dog/000.png").read_bytes())
        pack(folder)
    elif change == "no archive":
        archive.write_bytes(b"")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (forked,) = pool.map(refusal, [source])
    expected = {"no archive": "cannot be read as a zip archive", "removed": "No such file"}
    for message in (refusal(copy), forked):
        assert message.startswith(f"{archive}: ")
        assert expected.get(change, "the archive has changed while it was in use") in message
    assert contents(source) == before  # what is open stays open


def refusal(source: ImageSource) -> str:
    with pytest.raises(DataError) as caught:
        source.image(0)
    return str(caught.value)


def test_a_member_that_an_archive_lacks_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/1.jpg", b"")
    with pytest.raises(DataError, match=r"a\.zip: 'cat/2\.jpg' is not in the archive"):
        ZipTree(tmp_path / "a.zip").read("cat/2.jpg")


def test_two_folders_that_link_to_each_other_are_walked_once(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        for number in range(3):
            (tmp_path / one / f"to{number}").symlink_to(tmp_path / other)
    names, faults = FolderTree(tmp_path).listing()
    assert len(names) == 2 + 6  # a, b, and in each three links, none of which leads back yet
    assert len(faults) == 2 * 3 * 3


def test_what_a_set_is_made_for(make_tree: Tree, make_pairs: Tree, pack: Pack, tmp_path: Path) -> None:
    street, pets = make_pairs("street", {"train": 2, "val": 1}), make_tree("pets", {"cat": 2, "dog": 2})
    plain = make_pairs("plain", {"": 3})
    for path, task in ((street, "segment"), (pack(street), "segment"), (plain, "segment"), (pets, "classify")):
        assert task_for(path) == task_for(str(path)) == task
    assert task_for("scenes") == "segment"
    assert task_for("digits") == task_for(tmp_path / "nowhere") == "classify"
    for name in ("images", "masks"):
        (plain / name).rename(plain / name.capitalize())
    assert task_for(plain) == "segment"


# --- names ---


@pytest.mark.parametrize(
    ("source", "hint"),
    [("digit", "; did you mean 'digits'?"), ("cifar-100", "; did you mean 'cifar100'?"), ("", ""), ("quux", "")],
)
def test_an_unknown_source_suggests_the_nearest(source: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(source, "train")
    message = str(caught.value)
    assert message.startswith(f"data source '{source}' does not exist")
    assert all(name in message for name in SOURCE_NAMES)
    assert message.endswith(f"folder, .zip or .csv of images{hint}")


def test_a_missing_path_suggests_its_neighbour(make_tree: Tree, pack: Pack, tmp_path: Path) -> None:
    pack(make_tree("pets", {"cat": 1}))
    with pytest.raises(DataError, match=rf"; did you mean '{tmp_path}/pets\.zip'\?"):
        open_source(tmp_path / "pats.zip", "train")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat\.png' is none of folder, \.zip and \.csv"):
        open_source(tmp_path / "cat.png", "train")
    (tmp_path / "cat.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"cat\.zip: cannot be read as a zip archive"):
        open_source(tmp_path / "cat.zip", "train")


def test_a_name_goes_before_a_path(
    make_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_tree("digits", {"odd": 3, "even": 3})
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits", "train").classes) == 10
    assert len(open_source("digits", "val").classes) == 10
    said = "digits is the data set that pcenet knows by this name; for the images here write ./digits"
    assert [record.getMessage() for record in caplog.records] == [said], "once"
    assert open_source("./digits", "train").classes == ("even", "odd")
    assert open_source(Path("digits"), "train").classes == ("even", "odd")


def test_the_task_of_a_name_is_that_of_the_set_that_is_opened(
    make_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree("scenes", {"indoor": 2, "outdoor": 2})
    monkeypatch.chdir(tmp_path)
    assert (task_for("scenes"), task_for("./scenes")) == ("segment", "classify")


def test_an_unknown_split_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"train, val, test, all, not 'vall'; did you mean 'val'\?"):
        open_source("digits", "vall")


def test_all_images_whatever_their_split(make_tree: Tree, tmp_path: Path) -> None:
    make_tree("whole", {"cat": 5, "dog": 4})
    make_tree("parts", {"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 1})
    whole, parts = (open_source(tmp_path / name, "all") for name in ("whole", "parts"))
    assert sorted(whole.labels) == [0] * 5 + [1] * 4
    assert sorted(parts.labels) == [0] * 5 + [1] * 4
    assert [open_source(tmp_path / "whole", split).held_out for split in ("train", "val", "test", "all")] == [
        *(False, True, True, False)
    ]
    assert not open_source(tmp_path / "parts", "val").held_out
    with pytest.raises(DataError, match="split 'all' is for folders, archives and lists: 'digits' comes in train, val"):
        open_source("digits", "all")


def test_the_default_root_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "pcenet" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "pcenet" / "data"


# --- known sets ---


def test_digits_are_scikit_learns_scaled_to_255() -> None:
    splits = [open_source("digits", split) for split in SPLITS]
    seen = Counter(
        (split.labels[index], tuple(np.asarray(split.image(index)).ravel().tolist()))
        for split in splits
        for index in range(len(split))
    )
    digits = load_digits()
    # 16 levels to 255 with halves up: 16 -> 255, 8 -> 127.5 -> 128, 1 -> 15.9 -> 16
    expected = Counter(
        (int(label), tuple(int(value * 255 / 16 + 0.5) for value in image.ravel() for _ in range(3)))
        for label, image in zip(digits.target, digits.images, strict=True)
    )
    assert seen == expected
    assert max(value for _, image in seen for value in image) == 255
    for split in splits:
        assert split.classes == tuple("0123456789")
        assert not split.horizontal_flip
        assert split.image(0).size == (8, 8)


def test_digits_are_split_80_10_10_in_every_class() -> None:
    totals = Counter(load_digits().target.tolist())
    counts = {split: Counter(open_source("digits", split).labels) for split in SPLITS}
    for digit, total in totals.items():
        assert counts["val"][digit] == counts["test"][digit] == int(total / 10 + 0.5)
        assert counts["train"][digit] == total - 2 * int(total / 10 + 0.5)
    assert open_source("digits", "val").file_name(3) == "digits val[3]"


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"needs scikit-learn.*pip install 'pcenet\[digits\]'"):
        open_source("digits", "train")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_fashion_mnist_from_debians_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for stem, part in (("train", slice(0, 40)), ("t10k", slice(40, 60))):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images[part])
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(60)[part] % 10)
    monkeypatch.setattr(arrays_module, "DEBIAN_FASHION_MNIST", tmp_path)
    test = open_source("fashion-mnist", "test")
    assert test.classes[0] == "T-shirt/top"
    assert list(test.labels) == [*range(10), *range(10)]
    for index in range(20):
        assert np.array_equal(np.asarray(test.image(index)), images[40 + index][..., None].repeat(3, axis=2))
    val, train = open_source("fashion-mnist", "val"), open_source("fashion-mnist", "train")
    assert Counter(val.labels) == dict.fromkeys(range(10), 1)  # 10 % of 4, at least 1
    assert Counter(train.labels) == dict.fromkeys(range(10), 3)
    seen = {source.image(index).tobytes() for source in (val, train) for index in range(len(source))}
    assert seen == {Image.fromarray(image).convert("RGB").tobytes() for image in images[:40]}
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read as a gzipped IDX file"):
        open_source("fashion-mnist", "train")


def test_fashion_mnist_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, train, download))
        return SimpleNamespace(data=torch.arange(20).byte().view(20, 1, 1), targets=torch.arange(20) % 10)

    fake.classes = list("abcdefghij")
    monkeypatch.setattr(arrays_module, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fake)
    test = open_source("fashion-mnist", "test", root=tmp_path)
    assert [test.image(index).getpixel((0, 0)) for index in (0, 19)] == [(0, 0, 0), (19, 19, 19)]
    assert len(open_source("fashion-mnist", "train", root=tmp_path)) == 10
    assert calls == [(tmp_path, False, True), (tmp_path, True, True)]


def write_cifar(root: Path, name: str, label_key: str, files: Mapping[str, int], meta: tuple[str, str]) -> None:
    (root / name).mkdir()
    for number, (file, count) in enumerate(files.items()):
        data = np.full((count, 3072), number, dtype=np.uint8)
        data[:, :1024] = np.arange(count)[:, None]  # the red plane comes first
        batch = {"data": data, label_key: [index % 2 for index in range(count)]}
        (root / name / file).write_bytes(pickle.dumps(batch))
    (root / name / meta[0]).write_bytes(pickle.dumps({meta[1]: ["cat", "dog"]}))


def test_cifar_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of CIFAR's format; only torchvision's check of their digests is switched off."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    batches = {f"data_batch_{number}": 8 for number in range(1, 6)} | {"test_batch": 4}
    write_cifar(tmp_path, "cifar-10-batches-py", "labels", batches, ("batches.meta", "label_names"))
    write_cifar(tmp_path, "cifar-100-python", "fine_labels", {"train": 40, "test": 4}, ("meta", "fine_label_names"))
    for name, blue in (("cifar10", 5), ("cifar100", 1)):
        test = open_source(name, "test", root=tmp_path)
        assert test.classes == ("cat", "dog")
        assert list(test.labels) == [0, 1, 0, 1]
        assert test.image(3).getpixel((31, 0)) == (3, blue, blue)
        sizes = [Counter(open_source(name, split, root=tmp_path).labels) for split in ("train", "val")]
        assert sizes == [{0: 18, 1: 18}, {0: 2, 1: 2}]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(DataError) as caught:
        open_source("cifar10", "train", root=tmp_path)
    for part in ("'cifar10'", str(tmp_path), "Name or service not known", "network", "digits"):
        assert part in str(caught.value)
