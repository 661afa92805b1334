"""Names of files -> classes and splits: how a folder or an archive of images is understood.

Two layouts, either of them inside one more folder if need be::

    train/cat/1.jpg   val/cat/2.jpg   test/cat/3.jpg      "valid" and "validation" are read as "val"
    cat/1.jpg         dog/2.jpg                           the same as having "train" alone

A set with ``train`` alone is split deterministically 80/10/10 into train, val and test (``hold_out``); of one
with ``train`` and ``test``, 10 % of ``train`` become ``val``. Nothing is taken from ``train`` where ``val``
exists. Hidden files and those of macOS and Windows file managers do not count.

`read_layout` raises the first fault, `find_layout` lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

from pcenet.choices import Split
from pcenet.data.base import DataError, Fault
from pcenet.data.splits import hold_out, select_split

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS: Mapping[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})

Parts = tuple[str, ...]  # a path from the root of the tree; that of a folder ends in ""


class Item(NamedTuple):
    """One labelled image file: its name in the source, its name from the class folder on, its class."""

    name: str
    key: str
    label: int


@dataclass(frozen=True)
class Layout:
    """The classes of a set, sorted, and the files of each split that it comes with, sorted."""

    classes: tuple[str, ...]
    splits: Mapping[Split, list[Item]]

    def select(self, split: Split, where: str) -> list[Item]:
        """The files of one split; held out of ``train`` where the set comes without (see above).

        Raises:
            DataError: there is no such split and none to hold it out of; ``where`` names the set.
        """

        def out_of_train(items: list[Item], absent: list[Split]) -> dict[str, list[int]]:
            keys, labels = [item.key for item in items], [item.label for item in items]
            return hold_out(keys, labels, absent, classes=self.classes, where=where)

        return select_split(self.splits, split, out_of_train, where=where, content="a folder per class")


def read_layout(names: Iterable[str], where: str) -> Layout:
    """Find classes and splits in the names of a tree.

    Args:
        names: paths from the root of the tree, separated by "/"; those of folders end in "/".
        where: what to call the tree in an error.

    Raises:
        DataError: there are no images, or fewer than two classes; an image lies outside a class folder, a
            class folder is empty or holds another kind of file; a split lacks a class.
    """
    layout, faults = find_layout(names)
    if faults:
        raise DataError(f"{where}: {faults[0].text}")
    return layout


def find_layout(names: Iterable[str]) -> tuple[Layout, list[Fault]]:
    """What ``read_layout`` makes of a tree, as far as it can be understood, and everything that it would refuse."""
    faults: list[Fault] = []
    paths = data_paths(names, faults)
    if not any(is_image(path) for path in paths):
        expected = (
            f"Expected a folder per class, or the folders train, val and test with a folder per class in each, and in"
            f" these files that end in {', '.join(IMAGE_SUFFIXES)}."
        )
        return Layout((), {}), [*faults, Fault("", f"no images found. {expected}")]
    top = _single_top(paths)
    roots = _split_folders(paths, top, faults)
    by_split = {split: _by_class(paths, root, faults) for split, root in (roots or {"train": top}).items()}
    classes = sorted({name for by_class in by_split.values() for name in by_class})
    _check_classes(by_split, classes, roots, faults)
    splits = {
        split: [Item(*file, label) for label, name in enumerate(classes) for file in sorted(by_class.get(name, []))]
        for split, by_class in by_split.items()
    }
    return Layout(tuple(classes), splits), faults


def data_paths(names: Iterable[str], faults: list[Fault]) -> list[Parts]:
    """The names that count, in parts; an archive among them is a fault, since it is not looked into."""
    paths = [path for path in (tuple(name.split("/")) for name in names) if is_visible(path)]
    for name in ("/".join(path) for path in paths if _is_archive(path)):
        text = f"'{name}' is an archive inside the data set and is not opened. Unpack it there, or move it elsewhere."
        faults.append(Fault(name, text))
    return [path for path in paths if not _is_archive(path)]


def is_image(path: Parts) -> bool:
    """Whether a file is named like an image."""
    return path[-1].lower().endswith(IMAGE_SUFFIXES)


def split_roots(paths: list[Parts], folders: list[Parts], faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split out of ``folders``; two for one split, or an image beside them, are faults."""
    roots: dict[Split, Parts] = {}
    for split in get_args(Split):
        same = [folder for folder in folders if SPLIT_FOLDERS[folder[-1].lower()] == split]
        if len(same) > 1:
            faults.append(Fault(same[1][-1], f"the folders {_names(same)} all mean '{split}'. Keep one of them."))
        if same:
            roots[split] = same[0]
    for path in (path for path in paths if is_image(path) and path[: len(folders[0])] not in folders):
        name = "/".join(path)
        text = f"'{name}' lies beside the split folders {_names(folders)}. Move it into one of them, or remove it."
        faults.append(Fault(name, text))
    return roots


def is_visible(path: Parts) -> bool:
    """Whether a path is neither hidden nor made by a file manager."""
    return not any(part.startswith(".") or part in _IGNORED for part in path)


def _is_archive(path: Parts) -> bool:
    return path[-1].lower().endswith(".zip")


def _names(paths: Iterable[Parts]) -> str:
    return ", ".join(f"'{path[-1]}'" for path in paths)


def _single_top(paths: list[Parts]) -> Parts:
    """The one folder around the classes or splits; ``()`` where there is none."""
    tops = {path[0] for path in paths if len(path) > 1}
    if len(tops) != 1 or any(is_image(path) for path in paths if len(path) <= 2):
        return ()
    (top,) = tops
    below = {path[1].lower() for path in paths if len(path) > 2}
    return () if top.lower() in SPLIT_FOLDERS and not below <= SPLIT_FOLDERS.keys() else (top,)


def _split_folders(paths: list[Parts], top: Parts, faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split; none where the folders are classes, even if a class is called "train"."""
    depth = len(top)
    folders = sorted({path[: depth + 1] for path in paths if len(path) > depth + 1})
    named = [folder for folder in folders if folder[-1].lower() in SPLIT_FOLDERS]
    nested = any(len(path) > depth + 2 and path[: depth + 1] in named for path in paths)
    return split_roots(paths, named, faults) if named and (nested or named == folders) else {}


def _by_class(paths: list[Parts], root: Parts, faults: list[Fault]) -> dict[str, list[tuple[str, str]]]:
    """(name, key) of the image files below each class folder of ``root``."""
    by_class: dict[str, list[tuple[str, str]]] = {}
    depth = len(root)
    for path in (path for path in paths if path[:depth] == root and len(path) > depth):
        name = "/".join(path)
        if len(path) == depth + 1:
            if is_image(path):
                faults.append(Fault(name, f"'{name}' lies in no class folder. Move it into one."))
            continue
        files = by_class.setdefault(path[depth], [])
        if is_image(path):
            files.append((name, "/".join(path[depth:])))
        elif path[-1]:
            faults.append(not_an_image(name, "A class folder"))
    for name in (name for name, files in by_class.items() if not files):
        folder = "/".join((*root, name))
        faults.append(Fault(folder, f"the class folder '{folder}' holds no image. Fill it or remove it."))
    return by_class


def not_an_image(name: str, folder: str) -> Fault:
    """The fault of a file in a ``folder`` ("A class folder") that is for images alone."""
    return Fault(
        name,
        f"'{name}' is not named like an image. {folder} holds only files that end in"
        f" {', '.join(IMAGE_SUFFIXES)}. Move it elsewhere.",
    )


def _check_classes(
    by_split: Mapping[Split, Mapping[str, object]],
    classes: list[str],
    roots: Mapping[Split, Parts],
    faults: list[Fault],
) -> None:
    for split, by_class in by_split.items():
        lacking = [name for name in classes if name not in by_class]
        for name in lacking if by_class else lacking[:1]:
            text = (
                f"split '{split}' has no folder for class '{name}' ({len(lacking)} of {len(classes)} classes lack one)."
                f" Every split needs every class: add images or remove the class."
            )
            faults.append(Fault("/".join((*roots[split], name) if by_class else roots[split]), text))
    if len(classes) == 1:
        text = (
            f"only one class, '{classes[0]}', was found. Classification needs two or more: give each class a folder of"
            f" its own."
        )
        faults.append(Fault(classes[0], text))
