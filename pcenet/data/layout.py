"""Names of files -> classes and splits: how a folder or an archive of images is understood.

Two layouts, either of them inside one more folder if need be::

    train/cat/1.jpg   val/cat/2.jpg   test/cat/3.jpg      "valid" and "validation" are read as "val"
    cat/1.jpg         dog/2.jpg                           the same as having "train" alone

A set with ``train`` alone is split deterministically 80/10/10 into train, val and test (``hold_out``); of one
with ``train`` and ``test``, 10 % of ``train`` become ``val``. Nothing is taken from ``train`` where ``val``
exists. Hidden files and those of macOS and Windows file managers do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

from pcenet.choices import Split
from pcenet.data.base import DataError
from pcenet.data.splits import hold_out

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS: Mapping[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})

_Path = tuple[str, ...]


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
        absent: list[Split] = [part for part in ("val", "test") if part not in self.splits]
        if "train" in self.splits and "val" in absent and (split == "train" or split in absent):
            items = self.splits["train"]
            keys, labels = [item.key for item in items], [item.label for item in items]
            chosen = hold_out(keys, labels, absent, classes=self.classes, where=where)[split]
            return [items[index] for index in chosen]
        if split not in self.splits:
            raise DataError(
                f"{where}: there is no split '{split}', only {', '.join(self.splits)}."
                f" Choose one of these, or add a folder '{split}' with a folder per class."
            )
        return self.splits[split]


def read_layout(names: Iterable[str], where: str) -> Layout:
    """Find classes and splits in the names of a tree.

    Args:
        names: paths from the root of the tree, separated by "/"; those of folders end in "/".
        where: what to call the tree in an error.

    Raises:
        DataError: there are no images, or fewer than two classes; an image lies outside a class folder, a
            class folder is empty or holds another kind of file; a split lacks a class.
    """
    paths = [path for path in (tuple(name.split("/")) for name in names) if _visible(path)]
    if not any(_is_image(path) for path in paths):
        raise DataError(
            f"{where}: no images found. Expected a folder per class, or the folders train, val and test with"
            f" a folder per class in each, and in these files that end in {', '.join(IMAGE_SUFFIXES)}."
        )
    top = _single_top(paths)
    roots = _split_folders(paths, top, where)
    outside = [path for path in paths if _is_image(path) and path[: len(top) + 1] not in roots.values()]
    if roots and outside:
        raise DataError(
            f"{where}: '{'/'.join(outside[0])}' lies beside the split folders {_names(roots.values())}."
            f" Move it into one of them, or remove it."
        )
    by_split = {split: _by_class(paths, root, where) for split, root in (roots or {"train": top}).items()}
    classes = sorted({name for by_class in by_split.values() for name in by_class})
    _check_classes(by_split, classes, where)
    return Layout(
        tuple(classes),
        {
            split: [Item(*file, label) for label, name in enumerate(classes) for file in sorted(by_class[name])]
            for split, by_class in by_split.items()
        },
    )


def _visible(path: _Path) -> bool:
    return not any(part.startswith(".") or part in _IGNORED for part in path)


def _is_image(path: _Path) -> bool:
    return path[-1].lower().endswith(IMAGE_SUFFIXES)


def _names(paths: Iterable[_Path]) -> str:
    return ", ".join(f"'{path[-1]}'" for path in paths)


def _single_top(paths: list[_Path]) -> _Path:
    """The one folder around the classes or splits; ``()`` where there is none."""
    tops = {path[0] for path in paths if len(path) > 1}
    if len(tops) != 1 or any(_is_image(path) for path in paths if len(path) <= 2):
        return ()
    (top,) = tops
    below = {path[1].lower() for path in paths if len(path) > 2}
    return () if top.lower() in SPLIT_FOLDERS and not below <= SPLIT_FOLDERS.keys() else (top,)


def _split_folders(paths: list[_Path], top: _Path, where: str) -> dict[Split, _Path]:
    """The folder of each split; none where the folders are classes, even if a class is called "train"."""
    depth = len(top)
    folders = sorted({path[: depth + 1] for path in paths if len(path) > depth + 1})
    named = [folder for folder in folders if folder[-1].lower() in SPLIT_FOLDERS]
    nested = any(len(path) > depth + 2 and path[: depth + 1] in named for path in paths)
    if not nested and named != folders:
        return {}
    roots: dict[Split, _Path] = {}
    for split in get_args(Split):
        same = [folder for folder in named if SPLIT_FOLDERS[folder[-1].lower()] == split]
        if len(same) > 1:
            raise DataError(f"{where}: the folders {_names(same)} all mean '{split}'. Keep one of them.")
        if same:
            roots[split] = same[0]
    return roots


def _by_class(paths: list[_Path], root: _Path, where: str) -> dict[str, list[tuple[str, str]]]:
    """(name, key) of the image files below each class folder of ``root``."""
    by_class: dict[str, list[tuple[str, str]]] = {}
    depth = len(root)
    for path in (path for path in paths if path[:depth] == root and len(path) > depth):
        name = "/".join(path)
        if len(path) == depth + 1:
            if _is_image(path):
                raise DataError(f"{where}: '{name}' lies in no class folder. Move it into one.")
            continue
        files = by_class.setdefault(path[depth], [])
        if _is_image(path):
            files.append((name, "/".join(path[depth:])))
        elif path[-1]:
            raise DataError(
                f"{where}: '{name}' is not named like an image. A class folder holds only files that end in"
                f" {', '.join(IMAGE_SUFFIXES)}. Move it elsewhere."
            )
    for name, files in by_class.items():
        if not files:
            raise DataError(
                f"{where}: the class folder '{'/'.join((*root, name))}' holds no image. Fill it or remove it."
            )
    return by_class


def _check_classes(by_split: Mapping[Split, Mapping[str, object]], classes: list[str], where: str) -> None:
    for split, by_class in by_split.items():
        lacking = [name for name in classes if name not in by_class]
        if lacking:
            raise DataError(
                f"{where}: split '{split}' has no folder for class '{lacking[0]}' ({len(lacking)} of"
                f" {len(classes)} classes lack one). Every split needs every class: add images or"
                f" remove the class."
            )
    if len(classes) < 2:
        raise DataError(
            f"{where}: only one class, '{classes[0]}', was found. Classification needs two or more:"
            f" give each class a folder of its own."
        )
