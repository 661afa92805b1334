"""A data set by its name or path."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import get_args

from pcenet.choices import Split, did_you_mean
from pcenet.data.arrays import KNOWN_SOURCES
from pcenet.data.base import DataError, ImageSource
from pcenet.data.files import FileSource, FolderTree, ZipTree

SOURCE_NAMES = tuple(KNOWN_SOURCES)
SIMILAR = 0.6  # how like a word a name must be for a suggestion: a path may be anything

__all__ = ["SOURCE_NAMES", "ImageSource", "default_root", "open_source"]


def open_source(source: str | Path, split: Split, *, root: Path | None = None) -> ImageSource:
    """Open one split of a data set.

    Args:
        source: ``"digits"`` (needs no network), ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``, or the
            path of a folder or ``.zip`` of images (see ``pcenet.data.layout``). A name goes before a path;
            write ``./digits`` for a folder of that name.
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: the folder for downloads; by default ``default_root()``.

    Raises:
        DataError: (a ``ValueError``) the source or the split does not exist or is faulty.
    """
    splits = get_args(Split)
    if split not in splits:
        raise DataError(f"split must be one of {', '.join(splits)}, not '{split}'{did_you_mean(split, splits)}")
    if isinstance(source, str) and source in KNOWN_SOURCES:
        return KNOWN_SOURCES[source](split, root or default_root())
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return FileSource(FolderTree(Path(path)), split)
    if not os.path.exists(path):
        candidates = [*SOURCE_NAMES, *_usable_beside(Path(path))]
        raise DataError(
            f"data source '{source}' does not exist: it must be {', '.join(SOURCE_NAMES)}, or the path of a"
            f" folder or .zip of images{did_you_mean(str(source), candidates, SIMILAR)}"
        )
    if not path.lower().endswith(".zip"):
        raise DataError(f"data source '{source}' is neither a folder nor a .zip. Name a folder or .zip of images.")
    return FileSource(ZipTree(Path(path)), split)


def default_root() -> Path:
    """``pcenet/data`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pcenet" / "data"


def _usable_beside(path: Path) -> list[str]:
    """The folders and archives that a mistyped path may have meant."""
    beside = glob.glob(os.path.join(glob.escape(str(path.parent)), "*"))
    return [os.path.normpath(other) for other in beside if os.path.isdir(other) or other.endswith(".zip")]
