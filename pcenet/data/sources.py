"""A data set by its name or path."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import get_args

from pcenet.catalogue import fault_of_source, task_of_source
from pcenet.choices import GreyRange, IgnoreIndex, Part, Split, TaskName, check_grey_range, did_you_mean
from pcenet.data.arrays import KNOWN_SOURCES
from pcenet.data.base import DataError, ImageSource, SegmentationSource
from pcenet.data.files import FileSource, FileTree, FolderTree, ZipTree
from pcenet.data.lists import SUFFIX, ListTree
from pcenet.data.masks import MaskClasses, open_pairs
from pcenet.data.saved import SavedTree, is_saved
from pcenet.data.scenes import NAME, SceneSource

KNOWN_SEGMENTATION_SOURCES: Mapping[str, Callable[[Split], SegmentationSource]] = {NAME: SceneSource}

log = logging.getLogger(__name__)

SOURCE_NAMES = tuple(KNOWN_SOURCES)
SEGMENTATION_SOURCE_NAMES = tuple(KNOWN_SEGMENTATION_SOURCES)

__all__ = [
    "SEGMENTATION_SOURCE_NAMES",
    "SOURCE_NAMES",
    "ImageSource",
    "default_root",
    "open_segmentation_source",
    "open_source",
    "open_tree",
    "task_for",
]


def open_source(
    source: str | Path, split: Part, *, root: Path | None = None, grey_range: GreyRange | None = None
) -> ImageSource:
    """Open one split of a data set.

    Args:
        source: ``"digits"`` (needs no network), ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``, or the
            path of a folder or ``.zip`` of images (see ``pcenet.data.class_folders``), of a ``.csv`` that lists images
            (``pcenet.data.lists``), or of a folder of the library datasets (``pcenet.data.saved``). A name goes before
            a path; write ``./digits`` for a folder of that name.
        split: ``"train"``, ``"val"`` or ``"test"``; of a path also ``"all"``, the images of all splits.
        root: the folder for downloads; by default ``default_root()``.
        grey_range: of a folder or archive, see ``pcenet.data.images.decode_image``.

    Raises:
        DataError: (a ``ValueError``) the source or the split does not exist or is faulty.
        ValueError: ``grey_range`` is no range.
    """
    check_split(split)
    check_grey_range(grey_range)
    if isinstance(source, str) and source in KNOWN_SOURCES:
        return KNOWN_SOURCES[source](_own_split(source, split), root or default_root())
    _check_task(source, SEGMENTATION_SOURCE_NAMES, "segment")
    return FileSource(open_tree(source, SOURCE_NAMES), split, grey_range)


def open_segmentation_source(
    source: str | Path,
    split: Part,
    *,
    classes: Sequence[str] | str | None = None,
    ignore_index: IgnoreIndex = None,
    grey_range: GreyRange | None = None,
    known_classes: MaskClasses | None = None,
) -> SegmentationSource:
    """Open one split of a data set whose images have masks.

    Args:
        source: ``"scenes"`` (drawn when asked for, see `SceneSource`), or the path of a folder or ``.zip`` of images
            and masks (see ``pcenet.data.mask_folders``), or of a ``.csv`` that lists them (``pcenet.data.lists``). A
            name goes before a path; write ``./scenes`` for a folder of that name.
        split: ``"train"``, ``"val"`` or ``"test"``; of a path also ``"all"``, the images of all splits.
        classes: the name of each mask value, from 0 on, or the path of a text file with a name per line. By default
            the file ``classes.txt`` of the set; else the values in the masks that came for training, all of which
            are read for this, are the classes, named ``"0"``, ``"1"``, ...
        ignore_index: the mask value of the pixels that do not count, beside 255, which does not either. ``"none"``:
            every value counts, 255 too. The classes are numbered in the order of the values that count.
        grey_range: of a folder or archive, see ``pcenet.data.images.decode_image``.
        known_classes: what a trained network knows of its masks. Its names count where neither ``classes`` nor the set
            names the values, and its ignored values where ``ignore_index`` is None.

    Raises:
        DataError: (a ``ValueError``) the source or the split does not exist or is faulty, the classes are, or there are
            some for a source that has its own.
        ValueError: ``grey_range`` is no range.
    """
    check_split(split)
    check_grey_range(grey_range)
    if isinstance(source, str) and source in KNOWN_SEGMENTATION_SOURCES:
        known = KNOWN_SEGMENTATION_SOURCES[source](_own_split(source, split))
        if classes is not None or ignore_index is not None:
            raise DataError(
                f"classes and ignore_index are for folders and archives; the data source '{source}' has classes of its"
                f" own: {', '.join(known.classes)}. Leave both out, or write './{source}' for a folder of that name."
            )
        return known
    _check_task(source, SOURCE_NAMES, "classify")
    tree = open_tree(source, SEGMENTATION_SOURCE_NAMES)
    return open_pairs(
        tree, split, classes=classes, ignore_index=ignore_index, grey_range=grey_range, known=known_classes
    )


def task_for(source: str | Path) -> TaskName:
    """What a data set is made for: to segment where images have masks, else to classify.

    Args:
        source: as for `open_source` and `open_segmentation_source`; one that cannot be read is for them to refuse.
    """
    if task := task_of_source(source):
        return task
    try:
        tree = open_tree(source)
        pairs, _ = tree.find_pairs(tree.listing()[0])
    except DataError:
        return "classify"
    return "segment" if any(pairs.splits.values()) else "classify"


def check_split(split: str) -> None:
    """Raise a ``DataError`` unless ``split`` is one."""
    splits = get_args(Part)
    if split not in splits:
        raise DataError(f"split must be one of {', '.join(splits)}, not '{split}'{did_you_mean(split, splits)}")


def _own_split(source: str, split: Part) -> Split:
    """A split of a set with a name of its own; tells of a folder or file of that name, which may have been meant."""
    if split == "all":
        raise DataError(
            f"split 'all' is for folders, archives and lists: '{source}' comes in {', '.join(get_args(Split))}"
        )
    _tell_of_namesake(source, os.path.abspath(source))
    return split


@lru_cache
def _tell_of_namesake(source: str, path: str) -> None:
    """A line for each name and path, once."""
    if os.path.exists(path):
        log.warning("%s is the data set that pcenet knows by this name; for the images here write ./%s", source, source)


def _check_task(source: str | Path, names: Sequence[str], task: TaskName) -> None:
    """Raise a ``DataError`` for a name that another task knows, unless there is a folder or file of that name."""
    if source in names and not os.path.exists(source):
        what = "a class for each image" if task == "classify" else "a class for each pixel"
        raise DataError(f"data source '{source}' has {what}: it is for the task {task}. Choose that task.")


def open_tree(source: str | Path, names: Sequence[str] = ()) -> FileTree:
    """A data set of the user's own by its path: here all kinds of them part, and nowhere else.

    Args:
        source: its path.
        names: what ``source`` could have been beside a path, for the error.

    Raises:
        DataError: it does not exist or is something else.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return SavedTree(Path(path)) if is_saved(Path(path)) else FolderTree(Path(path))
    if fault := fault_of_source(source, names):
        raise DataError(fault)
    if path.lower().endswith(".zip"):
        return ZipTree(Path(path))
    if path.lower().endswith(SUFFIX):
        return ListTree(Path(path))
    raise DataError(f"data source '{source}' is none of folder, .zip and .csv. Name one of images.")


def default_root() -> Path:
    """``pcenet/data`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pcenet" / "data"
