"""A folder for each class: how a tree of labelled images is understood.

Two layouts, either of them inside one more folder if need be::

    train/cat/1.jpg   val/cat/2.jpg   test/cat/3.jpg      Training, dev, test_set and the like
    cat/1.jpg         dog/2.jpg                           the same as having "train" alone

Images may lie in folders below those of their classes. A set with ``train`` alone is split deterministically 80/10/10
into train, val and test (``hold_out``); of one with ``train`` and ``test``, 10 % of ``train`` become ``val``. Nothing
is taken from ``train`` where ``val`` exists. What systems leave in folders is not listed (``pcenet.data.names``).

Structure is guessed from names, so what contradicts the guess is a fault: images beside splits, folders of one name
below each class, images with their masks. What was guessed or passed over is a note.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from pcenet.choices import Part, Split
from pcenet.data.base import Fault
from pcenet.data.names import bare, difference, look, nearly, one_form
from pcenet.data.splits import hold_out, select_split
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

_MOST_SPLITS = 10  # more folders than this that hold the same folders are no splits
_SHOWN = 5  # names in a message

Files = Mapping[str, list[tuple[str, str]]]  # of each class: name and key of its images, see `Item`


class Item(NamedTuple):
    """One labelled image file: its name in the source, its name from the class folder on, its class."""

    name: str
    key: str
    label: int


@dataclass(frozen=True)
class Layout:
    """How a set was understood.

    Attributes:
        classes: their names, sorted.
        splits: the files of each split that the set comes with, sorted.
        notes: what was guessed, and what was passed over.
    """

    classes: tuple[str, ...]
    splits: Mapping[Split, list[Item]]
    notes: tuple[Fault, ...] = ()

    def select(self, split: Part, where: str) -> list[Item]:
        """The files of one split, held out of ``train`` where the set comes without (see above), or of all.

        Raises:
            DataError: there is no such split and none to hold it out of; ``where`` names the set.
        """

        def out_of_train(items: list[Item], absent: list[Split]) -> dict[str, list[int]]:
            keys, labels = [item.key for item in items], [item.label for item in items]
            return hold_out(keys, labels, absent, classes=self.classes, where=where)

        return select_split(self.splits, split, out_of_train, where=where)


def find_layout(names: Iterable[str], around: str = "") -> tuple[Layout, list[Fault]]:
    """Find classes and splits in the names of a tree.

    Args:
        names: paths from the root of the tree, separated by "/"; those of folders end in "/".
        around: the path of the folder around the tree, to be suggested where the tree is one class.

    Returns:
        The set, as far as it can be understood; and its faults: there are no images, or fewer than two classes; an
        image lies outside a class folder, is in a format that is not read, or has a name that is no text; a class
        folder is empty; a split lacks a class; what looks like classes are splits, or images and their masks.
    """
    faults: list[Fault] = []
    paths = data_paths(names, faults)
    if not any(is_image(path) for path in paths):
        expected = (
            f"Expected a folder per class, or the folders train, val and test with a folder per class in each, and in"
            f" these files that end in {', '.join(IMAGE_SUFFIXES)}."
        )
        unread = [unread_format("/".join(path)) for path in paths if is_unread(path)]
        return Layout((), {}), [*faults, *unread, Fault("", f"no images found. {expected}")]
    top = _single_top(paths)
    named = _split_folders(paths, top, faults)
    roots = {split: _inner(paths, root) for split, root in named.items()}
    strays: list[str] = []
    by_split = {
        split: _by_class(paths, root, faults, strays, around) for split, root in (roots or {"train": top}).items()
    }
    if not roots:
        _check_for_splits(paths, top, faults)
    _check_for_masks(by_split.values(), faults)
    layout = layout_of(by_split, (*split_notes(named), *left_out(strays, "class folders")))
    check_classes(by_split, layout.classes, faults, roots)
    return layout, faults


def layout_of(
    by_split: Mapping[Split, Files], notes: Sequence[Fault] = (), classes: Sequence[str] | None = None
) -> Layout:
    """The layout of images whose splits and classes are known.

    Args:
        by_split: of each split the images of each class.
        notes: what was guessed, and what was passed over.
        classes: their names by number; None: those that there are, sorted. Names are compared in one form.
    """
    if classes is None:
        spelling: dict[str, str] = {}  # in the first split that has the class
        for name in (name for by_class in by_split.values() for name in by_class):
            spelling.setdefault(one_form(name), name)
        classes = sorted(spelling.values())
    splits: dict[Split, list[Item]] = {}
    for split, by_class in by_split.items():
        files: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, found in by_class.items():
            files[one_form(name)] += found
        splits[split] = [
            Item(*file, label) for label, name in enumerate(classes) for file in sorted(files[one_form(name)])
        ]
    return Layout(tuple(classes), splits, tuple(notes))


def _single_top(paths: list[Parts]) -> Parts:
    """The one folder around the classes or splits; ``()`` where there is none."""
    tops = {path[0] for path in paths if len(path) > 1}
    if len(tops) != 1 or any(is_image(path) for path in paths if len(path) <= 2):
        return ()
    (top,) = tops
    below = {path[1].lower() for path in paths if len(path) > 2}
    return () if top.lower() in PLAIN_SPLITS and not below <= SPLIT_FOLDERS.keys() else (top,)


def _inner(paths: list[Parts], folder: Parts) -> Parts:
    """A folder, or the one in it that holds all of its images, in folders of its own: some archives come with
    ``train/train/cats``."""
    inside = [path[len(folder) :] for path in paths if path[: len(folder)] == folder and is_image(path)]
    names = {path[0] for path in inside}
    return (*folder, *names) if len(names) == 1 and all(len(path) > 2 for path in inside) else folder


def _split_folders(paths: list[Parts], top: Parts, faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split; none where the folders are classes, even if a class is called "train"."""
    depth = len(top)
    folders = sorted({path[: depth + 1] for path in paths if len(path) > depth + 1})
    named = [folder for folder in folders if folder[-1].lower() in SPLIT_FOLDERS]
    alone = {path[: depth + 1] for path in paths if len(path) > depth + 1 and is_image(path)} <= set(named)
    below = _folders_below(paths, named)
    nested = any(below[folder] and folder[-1].lower() in PLAIN_SPLITS for folder in named)
    alike = len(set().union(*below.values())) < sum(map(len, below.values()))  # two of them have a class in common
    return split_roots(paths, named, faults) if named and (alone or nested or alike) else {}


def _folders_below(paths: list[Parts], folders: Collection[Parts]) -> dict[Parts, set[str]]:
    """The names of the folders with images in each folder, in one form and in lower case."""
    below: dict[Parts, set[str]] = {folder: set() for folder in folders}
    depth = len(next(iter(folders), ()))
    for path in paths:
        if is_image(path) and len(path) > depth + 1 and path[:depth] in below:
            below[path[:depth]].add(one_form(path[depth]).casefold())
    return below


def _by_class(
    paths: list[Parts], root: Parts, faults: list[Fault], strays: list[str], around: str
) -> dict[str, list[tuple[str, str]]]:
    """(name, key) of the image files below each class folder of ``root``; files that are no images are ``strays``."""
    by_class: dict[str, list[tuple[str, str]]] = {}
    depth, alone = len(root), []
    for path in (path for path in paths if path[:depth] == root and len(path) > depth):
        name = "/".join(path)
        if len(path) == depth + 1:
            alone += [name] if is_image(path) else []
            continue
        files = by_class.setdefault(path[depth], [])
        if is_image(path):
            files.append((name, "/".join(path[depth:])))
        elif is_unread(path):
            faults.append(unread_format(name))
        elif path[-1]:
            strays.append(name)
    if alone and not any(by_class.values()):
        text = f"it holds images, such as '{alone[0]}', but no class folders: these have to lie in a folder per class."
        hint = f" Did you mean the folder around it, '{around}'?" if around and not root else ""
        faults.append(Fault("/".join(root), (f"'{'/'.join(root)}': {text}" if root else text) + hint))
        alone = []
    for name in alone:
        faults.append(Fault(name, f"'{name}' lies in no class folder. Move it into one."))
    for name in (name for name, files in by_class.items() if not files):
        folder = "/".join((*root, name))
        faults.append(Fault(folder, f"the class folder '{folder}' holds no image. Fill it or remove it."))
    faults += _same_looks(root, by_class)
    return by_class


def _same_looks(root: Parts, names: Iterable[str]) -> list[Fault]:
    """Class folders of one split whose names cannot be told apart."""
    faults = []
    for other, name in _alike(names):
        folder = "/".join((*root, name))
        text = (
            f"the class folders '{'/'.join((*root, other))}' and '{folder}' look alike and differ in"
            f" {difference(other, name)} only. Put their images into one of them."
        )
        faults.append(Fault(folder, text))
    return faults


def _alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that cannot be told apart."""
    first: dict[str, str] = {}
    for name in sorted(names):
        other = first.setdefault(look(name), name)
        if other != name:
            yield other, name


def _check_for_splits(paths: list[Parts], top: Parts, faults: list[Fault]) -> None:
    """Folders that hold the same folders, or nearly, and no images of their own, may be splits instead of classes."""
    depth = len(top)
    images = [path for path in paths if is_image(path) and len(path) > depth + 1]
    outer = sorted({path[: depth + 1] for path in images})
    if not 1 < len(outer) <= _MOST_SPLITS:  # asked first: a set may have a thousand classes and a million images
        return
    folders = [_inner(images, folder) for folder in outer]
    if any(path[:-1] in folders for path in images):
        return
    below = {folder: names for each in folders for folder, names in _folders_below(images, [each]).items()}
    # A folder in a folder of the same name, without classes: images that nobody has sorted.
    below = {folder: names for folder, names in below.items() if names != {one_form(folder[-1]).casefold()}}
    if len(below) < 2:
        return
    same = sorted(set.intersection(*below.values()))
    if len(same) > 1 and 2 * len(same) >= len(set.union(*below.values())):
        shown = ", ".join(f"'{name}'" for name in same[:_SHOWN]) + (", ..." if len(same) > _SHOWN else "")
        around = ", ".join(f"'{'/'.join(folder[depth:])}'" for folder in below)
        text = (
            f"the folders {around} hold the same folders, {shown}. If these are the classes, call the folders around"
            f" them train, val and test; if {around} are, move them into a folder 'train'."
        )
        faults.append(Fault("", text))


def _check_for_masks(by_split: Iterable[Files], faults: list[Fault]) -> None:
    """Folders of images and of their masks are no classes: a network would learn to tell a mask from an image."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for by_class in by_split:
        for name, found in by_class.items():
            files[name] += [key for _, key in found]
    names = {name.lower(): name for name in files}
    images, masks = (sorted(names[word] for word in names.keys() & words) for words in (IMAGE_WORDS, MASK_WORDS))
    named_after = [(name, f"{name}{sign}masks") for name in names for sign in ("", "_", "-", " ")]
    if len(names) == 2 and (pair := next((pair for pair in named_after if pair[1] in names), None)):
        images, masks = [names[pair[0]]], [names[pair[1]]]
    stems = {
        name: {key.partition("/")[2].rpartition(".")[0] for key in files[name]}
        for name in (*images, *masks)
        if images and masks
    }
    for image, mask in product(images, masks):
        paired = 2 * len(stems[image] & stems[mask]) >= len(stems[image]) > 0
        certain = (image.lower(), mask.lower()) == ("images", "masks")
        if (certain and paired) or (len(names) == 2 and (certain or paired)):
            text = (
                f"the folders '{image}' and '{mask}' are images and their masks, not classes. To learn the class of"
                f" each pixel the task is segment (--task segment), and the folders are called images and masks."
            )
            faults.append(Fault("", text))


def check_classes(
    by_split: Mapping[Split, Files], classes: Sequence[str], faults: list[Fault], roots: Mapping[Split, Parts] | None
) -> None:
    """Add a fault for every class that a split lacks, for a single class, and for classes that look alike and are no
    folders.

    Args:
        by_split: of each split the images of each class.
        classes: their names.
        faults: to be added to.
        roots: the folder of each split; None: classes are no folders.
    """
    what = "image" if roots is None else "folder"
    for split, by_class in by_split.items():
        there, alike = {one_form(name) for name in by_class}, {bare(name): name for name in by_class}
        lacking = [name for name in classes if one_form(name) not in there]
        for name in lacking if by_class else lacking[:1]:
            text = (
                f"split '{split}' has no {what} for class '{name}' ({len(lacking)} of {len(classes)} classes lack one)."
                f" Every split needs every class: add images or remove the class.{nearly(name, alike)}"
            )
            root = roots[split] if roots else ()
            faults.append(Fault("/".join((*root, name) if by_class else root), text))
    for other, name in _alike(classes) if roots is None else ():
        text = (
            f"the classes '{other}' and '{name}' look alike and differ in {difference(other, name)} only. Give their"
            " images one label."
        )
        faults.append(Fault(name, text))
    if len(classes) == 1:
        own = " a folder of its own" if roots is not None else " images of its own"
        text = f"only one class, '{classes[0]}', was found. Classification needs two or more: give each class{own}."
        faults.append(Fault(classes[0], text))
