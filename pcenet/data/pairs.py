"""Names of files -> images with their masks, and splits: how a tree for segmentation is understood.

Two layouts, either of them inside one more folder if need be::

    train/images/1.jpg   train/masks/1.png   val/images/2.jpg   val/masks/2.png      ...
    images/1.jpg         masks/1.png                             the same as having "train" alone

An image and its mask have the same name up to the suffix, folders below ``images`` and ``masks`` included. A file
``classes.txt`` beside the splits may name the classes. Names of splits, holding out and files that do not count are
as in ``pcenet.data.layout``.

`read_pairs` raises the first fault, `find_pairs` lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pcenet.choices import Split
from pcenet.data.base import DataError, Fault
from pcenet.data.layout import IMAGE_SUFFIXES, SPLIT_FOLDERS, Parts, data_paths, is_image, not_an_image, split_roots
from pcenet.data.splits import hold_out_alike, select_split

IMAGES, MASKS, CLASSES_FILE = "images", "masks", "classes.txt"
MASK_SUFFIX = ".png"


class Pair(NamedTuple):
    """An image file and its mask: their names in the source, and the name that they share."""

    image: str
    mask: str
    key: str


@dataclass(frozen=True)
class PairLayout:
    """The pairs of each split that a set comes with, sorted, and the file that names its classes, if any."""

    splits: Mapping[Split, list[Pair]]
    classes_file: str | None

    def select(self, split: Split, where: str) -> list[Pair]:
        """The pairs of one split; held out of ``train`` where the set comes without.

        Raises:
            DataError: there is no such split and none to hold it out of; ``where`` names the set.
        """

        def out_of_train(pairs: list[Pair], absent: list[Split]) -> dict[str, list[int]]:
            return hold_out_alike([pair.key for pair in pairs], absent, where=where)

        return select_split(self.splits, split, out_of_train, where=where, content="the folders images and masks")


def read_pairs(names: Iterable[str], where: str) -> PairLayout:
    """Find images, masks and splits in the names of a tree.

    Args:
        names: paths from the root of the tree, separated by "/"; those of folders end in "/".
        where: what to call the tree in an error.

    Raises:
        DataError: there are no folders ``images`` and ``masks``, one of them is missing, empty or holds another kind
            of file; an image has no mask or a mask no image; an image lies outside.
    """
    layout, faults = find_pairs(names)
    if faults:
        raise DataError(f"{where}: {faults[0].text}")
    return layout


def find_pairs(names: Iterable[str]) -> tuple[PairLayout, list[Fault]]:
    """What ``read_pairs`` makes of a tree, as far as it can be understood, and everything that it would refuse."""
    faults: list[Fault] = []
    paths = data_paths(names, faults)
    top = _single_top(paths)
    roots = _roots(paths, top, faults)
    splits = {split: _pairs(paths, root, faults) for split, root in roots.items()}
    named = [path for path in ((CLASSES_FILE,), (*top, CLASSES_FILE)) if path in paths]
    return PairLayout(splits, "/".join(named[-1]) if named else None), faults


def _single_top(paths: list[Parts]) -> Parts:
    """The one folder around splits, or around images and masks; ``()`` where there is none."""
    tops = {path[0] for path in paths if len(path) > 1}
    return tuple(tops) if len(tops) == 1 and not _mean_something(tops) else ()


def _mean_something(folders: Iterable[str]) -> bool:
    return any(folder.lower() in (*SPLIT_FOLDERS, IMAGES, MASKS) for folder in folders)


def _roots(paths: list[Parts], top: Parts, faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split, which holds images and masks."""
    depth = len(top)
    folders = sorted({path[: depth + 1] for path in paths if len(path) > depth + 1})
    if not _mean_something(folder[-1] for folder in folders):
        expected = (
            f"Expected them at the top, or in the folders train, val and test: images/NAME.jpg with masks/NAME.png."
            f" Images end in {', '.join(IMAGE_SUFFIXES)}, masks in {MASK_SUFFIX}."
        )
        faults.append(Fault("", f"no folders images and masks found. {expected}"))
        return {}
    named = [folder for folder in folders if folder[-1].lower() in SPLIT_FOLDERS]
    return split_roots(paths, named, faults) if named else {"train": top}


def _pairs(paths: list[Parts], root: Parts, faults: list[Fault]) -> list[Pair]:
    """The images of one split that have a mask."""
    files = {folder: _files(paths, (*root, folder), faults) for folder in (IMAGES, MASKS)}
    images, masks = files[IMAGES], files[MASKS]
    if images is None or masks is None:
        return []
    if not images:
        folder = "/".join((*root, IMAGES))
        faults.append(Fault(folder, f"'{folder}' holds no image. Fill it, or remove the split."))
    for key in sorted(images.keys() - masks.keys()):
        name, mask = images[key], "/".join((*root, MASKS, key)) + MASK_SUFFIX
        faults.append(Fault(name, f"'{name}' has no mask: there is no '{mask}'. Add it, or remove the image."))
    for key in sorted(masks.keys() - images.keys()):
        name, folder = masks[key], "/".join((*root, IMAGES))
        text = f"'{name}' has no image: no file in '{folder}' has its name. Add the image, or remove the mask."
        faults.append(Fault(name, text))
    return [Pair(images[key], masks[key], key) for key in sorted(images.keys() & masks.keys())]


def _files(paths: list[Parts], folder: Parts, faults: list[Fault]) -> dict[str, str] | None:
    """The files below ``images`` or ``masks`` by what they are called up to the suffix; None without the folder."""
    depth, label = len(folder), "/".join(folder)
    below = [path for path in paths if len(path) > depth and path[:depth] == folder]
    if not below:
        text = f"there is no folder '{label}'. Images lie in a folder 'images' and their masks beside it in 'masks'."
        faults.append(Fault(label, text))
        return None
    files: dict[str, str] = {}
    for path in sorted(path for path in below if path[-1]):
        name = "/".join(path)
        if folder[-1] == IMAGES and not is_image(path):
            faults.append(not_an_image(name, f"'{label}'"))
            continue
        if folder[-1] == MASKS and not name.lower().endswith(MASK_SUFFIX):
            text = f"'{name}' is no PNG file. Masks are PNG files, which keep every value. Convert or move it."
            faults.append(Fault(name, text))
            continue
        key = "/".join(path[depth:]).rpartition(".")[0]
        if key in files:
            faults.append(Fault(name, f"'{name}' and '{files[key]}' differ in the suffix alone. Rename or remove one."))
        files.setdefault(key, name)
    return files
