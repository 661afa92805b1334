"""What the user named -> the files to predict, and those that cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from pcenet.choices import GreyRange, did_you_mean
from pcenet.data.base import DataError
from pcenet.data.files import FileTree, FolderTree, ZipTree
from pcenet.data.images import decode_image
from pcenet.data.tree import IMAGE_SUFFIXES, is_image

ARCHIVE = ".zip"
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
SIMILAR = 0.6  # how like a word a path must be for a suggestion


@dataclass(frozen=True)
class InputFile:
    """One image file.

    Attributes:
        file: its path, exactly: the one that the user gave, and the path within that.
        tree: what it is read from.
        name: its path within the tree.
        origin: the last component of the path that the user gave; empty for a file that was given itself.
        grey_range: see ``pcenet.data.images.decode_image``.
    """

    file: str
    tree: FileTree
    name: str
    origin: str = ""
    grey_range: GreyRange | None = None

    def image(self) -> Image.Image:
        """The image, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""
        return decode_image(self.tree.read(self.name), self.file, grey_range=self.grey_range)

    @property
    def is_video(self) -> bool:
        """Whether it is named like a video."""
        return self.name.lower().endswith(VIDEO_SUFFIXES)


@dataclass(frozen=True)
class LeftOut:
    """A file that was not predicted, by its path as in `InputFile`, and why."""

    file: str
    reason: str


def find_inputs(
    paths: Sequence[str], grey_range: GreyRange | None = None, *, videos: bool = False
) -> tuple[list[InputFile], list[LeftOut]]:
    """The image files that paths name, each once, in the order of the paths and sorted below each.

    Args:
        paths: image files, which may be called anything; folders, searched with all that is below them, and ``.zip``
            archives, where files that are not named like images are left out. Hidden files and those that systems leave
            in folders do not count. A file that several paths lead to comes once, under the first of them; links to it
            are files of their own.
        grey_range: see ``pcenet.data.images.decode_image``.
        videos: whether files that are named like videos count too, those in archives aside.

    Raises:
        ValueError: if a path does not exist, or if nothing was found at all.
    """
    for path in paths:
        if not os.path.lexists(path):
            hint = did_you_mean(path, _beside(Path(path)), SIMILAR)
            raise ValueError(f"inputs: {path!r} does not exist; give files, folders or .zip archives{hint}")
    found: dict[tuple[str, ...], InputFile | LeftOut] = {}
    for root in map(Path, paths):
        for name, item in _below(root, videos):
            found.setdefault(_identity(root, name), item)
    if not found:
        raise ValueError(
            f"inputs: no image file in {', '.join(paths)}; give files, or folders or .zip archives with files that end"
            f" in {', '.join(IMAGE_SUFFIXES)}"
        )
    files = [replace(item, grey_range=grey_range) for item in found.values() if isinstance(item, InputFile)]
    return files, [item for item in found.values() if isinstance(item, LeftOut)]


def _identity(path: Path, name: str) -> tuple[str, ...]:
    """What no other file has in common with the one of this name below a path: where it lies, and its name there."""
    if path.is_dir():
        path, name = path / name, ""
    return os.path.realpath(path.parent), path.name, name


def _below(path: Path, videos: bool) -> Iterator[tuple[str, InputFile | LeftOut]]:
    """The files below a path by their names within it; ``""`` for the path itself."""
    tree: FileTree
    if path.is_dir():
        tree = FolderTree(path)
    elif path.suffix.lower() == ARCHIVE:
        tree = ZipTree(path)
    else:
        yield "", InputFile(str(path), FolderTree(path.parent), path.name)
        return
    try:
        names = sorted(tree.names())
    except DataError as error:
        yield "", LeftOut(str(path), str(error))
        return
    for name in names:
        parts = tuple(name.split("/"))
        if not parts[-1]:
            continue
        file = os.path.join(path, name) if path != Path() else name
        found = InputFile(file, tree, name, origin=path.resolve().name)
        if is_image(parts) or (videos and found.is_video and path.is_dir()):
            yield name, found
        elif name.lower().endswith(ARCHIVE):
            yield name, LeftOut(file, "an archive inside a folder or an archive is not read; give it by itself")
        else:
            yield name, LeftOut(file, "it is not named like an image")


def _beside(path: Path) -> Iterable[str]:
    try:
        return [str(path.with_name(name)) for name in os.listdir(path.parent)]
    except (OSError, ValueError):
        return []
