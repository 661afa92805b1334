"""Folders and zip archives of images."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from PIL import Image

from pcenet.choices import Split
from pcenet.data.base import DataError, ImageSource
from pcenet.data.images import decode_image
from pcenet.data.layout import read_layout


class FileTree(Protocol):
    """A tree of files that can be listed and read."""

    path: Path

    def names(self) -> list[str]:
        """Paths from the root, separated by "/"; those of folders end in "/"."""

    def read(self, name: str) -> bytes:
        """The content of one file."""


class FolderTree:
    """The files of a folder. Symbolic links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """All files and folders below. Raises ``DataError`` at a folder that cannot be read."""

        def refuse(error: OSError) -> None:
            raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}).") from error

        names = []
        for folder, subfolders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            prefix = Path(folder).relative_to(self.path).as_posix().removeprefix(".")
            prefix = f"{prefix}/" if prefix else ""
            names += [f"{prefix}{name}/" for name in subfolders] + [f"{prefix}{name}" for name in files]
        return names

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read."""
        path = self.path / name
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{path}: it is no regular file. Remove it.")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error


class ZipTree:
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

    def names(self) -> list[str]:
        """All entries. Raises ``DataError`` at one that is unsafe, encrypted or compressed in a rare way."""
        entries = self._open().infolist()
        for entry in entries:
            self._check(entry)
        return list(dict.fromkeys(entry.filename for entry in entries))  # of two of one name the later is read

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it is damaged."""
        archive = self._open()
        try:
            return archive.read(name)
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

    def _check(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ":" in name[:2] or ".." in name.split("/"):
            raise DataError(
                f"{self.path}: unsafe name '{name}': a name in an archive must be relative, separated by '/',"
                f" and without '..'. Make the archive anew."
            )
        if entry.flag_bits & 0x1:
            raise DataError(f"{self.path}: '{name}' is encrypted. Make the archive anew without a password.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.path}: '{name}' is compressed with method {entry.compress_type}; only stored and"
                f" deflated files are read. Make the archive anew with one of these."
            )


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
