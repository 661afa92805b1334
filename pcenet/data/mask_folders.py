"""Folders of images and masks: how a tree for segmentation is understood.

Three layouts, each of them inside one more folder if need be::

    train/images/1.jpg   train/masks/1.png   val/images/2.jpg   val/masks/2.png      ...
    images/train/1.jpg   masks/train/1.png   images/val/2.jpg   masks/val/2.png      ...
    images/1.jpg         masks/1.png                             the same as having "train" alone

An image and its mask have the same name up to the suffix, folders below ``images`` and ``masks`` included. ``Images``
and ``MASKS`` will do. A file ``classes.txt`` beside the splits may name the classes. Names of splits, holding out and
files that do not count are as in `pcenet.data.class_folders`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pcenet.choices import Part, Split
from pcenet.data.base import Fault
from pcenet.data.names import bare, difference, nearly, one_form
from pcenet.data.splits import hold_out_alike, select_split
from pcenet.data.tree import (
    IMAGE_SUFFIXES,
    IMAGE_WORDS,
    MASK_WORDS,
    PLAIN_SPLITS,
    SPLIT_FOLDERS,
    Parts,
    data_paths,
    is_image,
    is_unread,
    left_out,
    split_notes,
    split_roots,
    unread_format,
)

IMAGES, MASKS, CLASSES_FILE = "images", "masks", "classes.txt"
MASK_SUFFIX = ".png"


class Pair(NamedTuple):
    """An image file and its mask: their names in the source, and the name that they share."""

    image: str
    mask: str
    key: str


@dataclass(frozen=True)
class PairLayout:
    """How a set was understood.

    Attributes:
        splits: the pairs of each split that the set comes with, sorted.
        classes_file: the file that names its classes, if any.
        notes: what was guessed, and what was passed over.
    """

    splits: Mapping[Split, list[Pair]]
    classes_file: str | None
    notes: tuple[Fault, ...] = ()

    def select(self, split: Part, where: str) -> list[Pair]:
        """The pairs of one split, held out of ``train`` where the set comes without, or of all.

        Raises:
            DataError: there is no such split and none to hold it out of; ``where`` names the set.
        """

        def out_of_train(pairs: list[Pair], absent: list[Split]) -> dict[str, list[int]]:
            return hold_out_alike([pair.key for pair in pairs], absent, where=where)

        return select_split(self.splits, split, out_of_train, where=where)


def find_pairs(names: Iterable[str], only: Split | None = None) -> tuple[PairLayout, list[Fault]]:
    """Find images, masks and splits in the names of a tree.

    Args:
        names: paths from the root of the tree, separated by "/"; those of folders end in "/".
        only: where there is a folder for this split, the faults of other splits are passed over.

    Returns:
        The set, as far as it can be understood; and its faults: there are no folders ``images`` and ``masks``, one of
        them is missing, empty or holds images in a format that is not read; an image has no mask or a mask no image;
        an image lies outside.
    """
    faults: list[Fault] = []
    paths = data_paths(names, faults)
    top = _single_top(paths)
    roots = _roots(paths, top, faults)
    within = _splits_within(paths, top) if roots == {"train": top} else {}
    places: dict[Split, tuple[Parts, Parts]] = {split: (root, ()) for split, root in roots.items()}
    if within:
        places = {split: (top, (name,)) for split, name in within.items()}
    strays: list[str] = []
    passed_over: list[Fault] = []
    splits = {
        split: _pairs(paths, *place, faults if only not in places or split == only else passed_over, strays)
        for split, place in places.items()
    }
    split_folders = {split: (*root, *inner) for split, (root, inner) in places.items() if (*root, *inner) != top}
    notes = (*split_notes(split_folders), *left_out(strays, "folders of images and masks"))
    named = [path for path in ((CLASSES_FILE,), (*top, CLASSES_FILE)) if path in paths]
    return PairLayout(splits, "/".join(named[-1]) if named else None, notes), faults


def _single_top(paths: list[Parts]) -> Parts:
    """The one folder around splits, or around images and masks; ``()`` where there is none."""
    tops = {path[0] for path in paths if len(path) > 1}
    meant = PLAIN_SPLITS | {IMAGES, MASKS}
    return tuple(tops) if len(tops) == 1 and not meant & {top.lower() for top in tops} else ()


def _roots(paths: list[Parts], top: Parts, faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split, which holds images and masks."""
    depth = len(top)
    folders = sorted({path[: depth + 1] for path in paths if len(path) > depth + 1})
    if not {folder[-1].lower() for folder in folders} & (SPLIT_FOLDERS.keys() | IMAGE_WORDS | MASK_WORDS):
        expected = (
            f"Expected them at the top, or in the folders train, val and test: images/NAME.jpg with masks/NAME.png."
            f" Images end in {', '.join(IMAGE_SUFFIXES)}, masks in {MASK_SUFFIX}."
        )
        faults.append(Fault("", f"no folders images and masks found. {expected}"))
        return {}
    there = {folder[-1].lower() for folder in folders}
    # Beside images and masks a folder called "dev" or "eval" may be anything.
    meant = PLAIN_SPLITS if {IMAGES, MASKS} <= there else SPLIT_FOLDERS.keys()
    named = [folder for folder in folders if folder[-1].lower() in meant]
    return split_roots(paths, named, faults) if named else {"train": top}


def _splits_within(paths: list[Parts], top: Parts) -> dict[Split, str]:
    """The folders of splits below ``images``, where all images lie in such folders, of at least two splits."""
    depth = len(top)
    inside = [path for path in paths if path[:depth] == top and is_image(path) and len(path) > depth + 1]
    below = [path[depth + 1 :] for path in inside if path[depth].lower() == IMAGES]
    names = sorted({path[0] if len(path) > 1 else "" for path in below})
    splits = {SPLIT_FOLDERS[name.lower()]: name for name in names if name.lower() in SPLIT_FOLDERS}
    return splits if 1 < len(splits) == len(names) else {}


def _pairs(paths: list[Parts], root: Parts, inner: Parts, faults: list[Fault], strays: list[str]) -> list[Pair]:
    """The images of one split that have a mask; ``inner`` is its folder within ``images`` and ``masks``, if any."""
    found = {name: _folder(paths, root, name, faults) for name in (IMAGES, MASKS)}
    folders = {name: folder and (*folder, *inner) for name, folder in found.items()}
    files = {name: _files(paths, folder, name, faults, strays) for name, folder in folders.items() if folder}
    if len(files) < 2:
        return []
    images, masks = files[IMAGES], files[MASKS]
    where = {name: "/".join(folder) for name, folder in folders.items() if folder}
    if not images:
        faults.append(Fault(where[IMAGES], f"'{where[IMAGES]}' holds no image. Fill it, or remove the split."))
    without_mask, without_image = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    alike = [{bare(key): key for key in keys} for keys in (without_mask, without_image)]
    for key in without_mask:
        name, mask = images[key], f"{where[MASKS]}/{key}{MASK_SUFFIX}"
        text = f"'{name}' has no mask: there is no '{mask}'. Add it, or remove the image.{nearly(key, alike[1])}"
        faults.append(Fault(name, text))
    for key in without_image:
        name = masks[key]
        text = f"'{name}' has no image: no file in '{where[IMAGES]}' has its name. Add the image, or remove the mask."
        faults.append(Fault(name, f"{text}{nearly(key, alike[0])}"))
    depth = len(where[IMAGES]) + 1
    pairs = [Pair(images[key], masks[key], _stem(images[key][depth:])) for key in images.keys() & masks.keys()]
    return sorted(pairs, key=lambda pair: pair.key)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _folder(paths: list[Parts], root: Parts, name: str, faults: list[Fault]) -> Parts | None:
    """The folder ``images`` or ``masks`` of a split, in whatever case; None, with a fault, where there is none."""
    depth = len(root)
    there = sorted({path[depth] for path in paths if path[:depth] == root and len(path) > depth + 1})
    found = [name] if name in there else [folder for folder in there if folder.lower() == name]
    label = "/".join((*root, name))
    if len(found) > 1:
        text = f"the folders {' and '.join(map(repr, found))} both mean '{name}'. Put their files into one."
        faults.append(Fault("/".join((*root, found[1])), text))
    if found:
        return (*root, found[0])
    meant = [folder for folder in there if folder.lower() in (IMAGE_WORDS if name == IMAGES else MASK_WORDS)]
    hint = f" Is it '{meant[0]}'? Call it '{name}'." if meant else ""
    text = f"there is no folder '{label}'. Images lie in a folder 'images' and their masks beside it in 'masks'.{hint}"
    faults.append(Fault(label, text))
    return None


def _files(paths: list[Parts], folder: Parts, kind: str, faults: list[Fault], strays: list[str]) -> dict[str, str]:
    """The files below ``images`` or ``masks`` by what they are called up to the suffix, in one form."""
    depth = len(folder)
    files: dict[str, str] = {}
    for path in sorted(path for path in paths if path[:depth] == folder and len(path) > depth and path[-1]):
        name = "/".join(path)
        if kind == IMAGES and is_unread(path):
            faults.append(unread_format(name))
        elif not is_image(path) and not is_unread(path):
            strays.append(name)
        elif kind == MASKS and not name.lower().endswith(MASK_SUFFIX):
            text = f"'{name}' is no PNG file. Masks are PNG files, which keep every value. Convert or move it."
            faults.append(Fault(name, text))
        else:
            key = one_form(_stem("/".join(path[depth:])))
            first = files.setdefault(key, name)
            if first != name:
                how = difference(first, name) or "the suffix"
                faults.append(Fault(name, f"'{name}' and '{first}' differ in {how} alone. Rename or remove one."))
    return files
