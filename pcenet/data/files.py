"""Folders and zip archives of images."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image

from pcenet.choices import Split
from pcenet.data.base import DataError, Fault, ImageSource
from pcenet.data.images import decode_image
from pcenet.data.layout import read_layout

LARGEST_FILE = 2**28  # bytes


class FileTree(ABC):
    """A tree of files that can be listed and read."""

    path: Path

    def names(self) -> list[str]:
        """Paths from the root, separated by "/"; those of folders end in "/". Raises the first fault of `listing`."""
        names, faults = self.listing()
        if faults:
            raise DataError(f"{self.path}: {faults[0].text}")
        return names

    @abstractmethod
    def listing(self) -> tuple[list[str], list[Fault]]:
        """The names of all that can be read, and what cannot. Raises ``DataError`` where that is everything."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read or is damaged."""


class FolderTree(FileTree):
    """The files of a folder. Symbolic links are followed, but not round in a circle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listing(self) -> tuple[list[str], list[Fault]]:
        """All files and folders below; a folder that cannot be read is a fault."""
        faults = []

        def note(error: OSError) -> None:
            name = Path(error.filename).relative_to(self.path).as_posix()
            text = f"the folder '{name}' cannot be read ({error.strerror}). Change its permissions or move it away."
            faults.append(Fault(name, text))

        names = []
        for folder, subfolders, files in os.walk(self.path, onerror=note, followlinks=True):
            prefix = Path(folder).relative_to(self.path).as_posix().removeprefix(".")
            prefix = f"{prefix}/" if prefix else ""
            for name in [name for name in subfolders if _leads_back(folder, name)]:
                subfolders.remove(name)
                text = f"the folder '{prefix}{name}' is a link to a folder that it lies in. Remove the link."
                faults.append(Fault(f"{prefix}{name}", text))
            names += [f"{prefix}{name}/" for name in subfolders] + [f"{prefix}{name}" for name in files]
        return names, faults

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read."""
        path = self.path / name
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{path}: it is no regular file. Remove it.")
        try:
            _check_size(path, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error


class ZipTree(FileTree):
    """The files of a zip archive, read in place.

    Each process opens the archive for itself: a file position must not be shared with a forked worker, and an
    open file cannot be pickled for a spawned one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_archive": None, "_process": 0}

    def listing(self) -> tuple[list[str], list[Fault]]:
        """All entries; one that is unsafe, encrypted or compressed in a rare way is a fault."""
        entries = self._open().infolist()
        found = ((entry.filename, _entry_fault(entry)) for entry in entries)
        faults = {name: Fault(name, text) for name, text in found if text}
        names = dict.fromkeys(entry.filename for entry in entries)  # of two of one name the later is read
        return [name for name in names if name not in faults], list(faults.values())

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it is damaged."""
        archive = self._open()
        try:
            _check_size(f"{self.path}: '{name}'", archive.getinfo(name).file_size)
            return archive.read(name)
        except DataError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: '{name}' is damaged in the archive ({error}). Make or download it anew."
            ) from error

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._process != os.getpid():
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise DataError(
                    f"{self.path}: cannot be read as a zip archive ({error}). Make or download it anew."
                ) from error
            self._process = os.getpid()
        return self._archive


def _leads_back(folder: str, name: str) -> bool:
    """Whether a link in a folder leads to that folder or one around it."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))


def _check_size(name: object, size: int) -> None:
    """Raise a ``DataError`` for a file larger than any image need be; an archive unpacks to no more than it says."""
    if size > LARGEST_FILE:
        raise DataError(f"{name}: the file has {size} bytes, more than {LARGEST_FILE}. Shrink or remove it.")


def _entry_fault(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry of an archive is not read, if so."""
    name = entry.filename
    if name.startswith("/") or "\\" in name or ":" in name[:2] or ".." in name.split("/"):
        return (
            f"unsafe name '{name}': a name in an archive must be relative, separated by '/', and without '..'."
            f" Make the archive anew."
        )
    if stat.S_ISLNK(entry.external_attr >> 16):
        return f"'{name}' is a symbolic link. Make the archive anew with the files themselves."
    if entry.flag_bits & 0x1:
        return f"'{name}' is encrypted. Make the archive anew without a password."
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return (
            f"'{name}' is compressed with method {entry.compress_type}; only stored and deflated files are read."
            f" Make the archive anew with one of these."
        )
    return None


class FileSource(ImageSource):
    """One split of a tree of image files; ``pcenet.data.layout`` says how the tree is understood."""

    def __init__(self, tree: FileTree, split: Split) -> None:
        layout = read_layout(tree.names(), str(tree.path))
        items = layout.select(split, str(tree.path))
        super().__init__(
            os.path.basename(os.path.abspath(tree.path)), split, layout.classes, [item.label for item in items]
        )
        self._tree = tree
        self._names = [item.name for item in items]

    def image(self, index: int) -> Image.Image:
        """Image ``index``, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""
        return decode_image(self._tree.read(self._names[index]), f"{self._tree.path}: '{self._names[index]}'")

    def file_name(self, index: int) -> str:
        """Path of image ``index`` from the root of the folder or archive."""
        return self._names[index]
