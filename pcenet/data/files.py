"""Folders and zip archives of images."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pcenet.choices import GreyRange, Part, Split
from pcenet.data.base import DataError, Fault, ImageSource, faultless
from pcenet.data.class_folders import Layout, find_layout
from pcenet.data.images import decode_image
from pcenet.data.limits import LARGEST_FILE, file_fault
from pcenet.data.mask_folders import PairLayout, find_pairs
from pcenet.data.names import is_visible
from pcenet.data.splits import held_out_parts
from pcenet.reading import check_regular


class FileTree(ABC):
    """A tree of files that can be listed, understood and read: what a data set is to all that uses it.

    A set whose classes and splits are told, not guessed from names of folders, has its own `find_layout` and
    `find_pairs`.

    Attributes:
        path: of the folder or archive.
        around: the path of the folder around it, if it is a folder, as a user would write it.
    """

    path: Path
    around: str = ""

    def names(self) -> list[str]:
        """Paths from the root, separated by "/"; those of folders end in "/". Raises the first fault of `listing`."""
        return faultless(self.listing(), str(self.path))

    @abstractmethod
    def listing(self) -> tuple[list[str], list[Fault]]:
        """The names of all that can be read, and what cannot; neither of what systems leave in folders.

        Raises ``DataError`` where nothing can be read.
        """

    def find_layout(self, names: Sequence[str]) -> tuple[Layout, list[Fault]]:
        """The classes and splits of labelled images, and what is wrong with them; ``names`` are those of `listing`."""
        return find_layout(names, self.around)

    def find_pairs(self, names: Sequence[str], only: Split | None = None) -> tuple[PairLayout, list[Fault]]:
        """Images and their masks, and what is wrong with them; of one split, where that is all that counts."""
        return find_pairs(names, only)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read or is damaged."""


class FolderTree(FileTree):
    """The files of a folder. Symbolic links are followed, but not round in a circle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.around = os.path.normpath(path / os.pardir)

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
            subfolders[:] = [name for name in subfolders if is_visible((name,))]  # others are not even entered
            for name in [name for name in subfolders if _leads_back(self.path, prefix, name)]:
                subfolders.remove(name)
                text = f"the folder '{prefix}{name}' is a link to a folder that it lies in. Remove the link."
                faults.append(Fault(f"{prefix}{name}", text))
            names += [f"{prefix}{name}/" for name in subfolders]
            names += [f"{prefix}{name}" for name in files if is_visible((name,))]
        return names, faults

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read."""
        path = self.path / name
        try:
            check_regular(path, LARGEST_FILE)
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise DataError(str(error)) from error


class ZipTree(FileTree):
    """The files of a zip archive, read in place, under normalised names: "./a//b.jpg" and "a\\b.jpg" are "a/b.jpg".

    Each process opens the archive for itself: a file position must not be shared with a forked worker, and an
    open file cannot be pickled for a spawned one. All of them have to find the same archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._content = b""  # a digest of names, sizes and checksums, once it has been opened
        self._process = 0

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_archive": None, "_entries": {}, "_content": self._content, "_process": 0}

    def listing(self) -> tuple[list[str], list[Fault]]:
        """All entries; one that is unsafe, encrypted, there twice, or compressed in a rare way is a fault."""
        faults: dict[str, Fault] = {}
        spelling: dict[str, str] = {}
        for entry in self._open().infolist():
            name = _normalised(entry.filename)
            fault = _unsafe(entry.filename)
            if not fault and not is_visible(name.split("/")):
                continue
            first = spelling.setdefault(name, entry.filename)
            if not fault and first != entry.filename and not entry.is_dir():
                fault = f"'{first}' and '{entry.filename}' are the same file. Make the archive anew with one of them."
            if fault := fault or _unreadable(entry):
                faults[name] = Fault(name, fault)
        return [name for name in spelling if name and name not in faults], list(faults.values())

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it is damaged, or where the archive has changed."""
        archive = self._open()
        if name not in self._entries:
            raise DataError(f"{self.path}: '{name}' is not in the archive. Put back the archive that held it.")
        entry = self._entries[name]
        if fault := file_fault(entry.file_size):
            raise DataError(f"{self.path}: '{name}': {fault}")
        try:
            return archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: '{name}' is damaged in the archive ({error}). Make or download it anew."
            ) from error

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._process != os.getpid():
            try:
                check_regular(self.path)
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise DataError(
                    f"{self.path}: cannot be read as a zip archive ({error}). Make or download it anew."
                ) from error
            entries = self._archive.infolist()
            self._entries = {_normalised(entry.filename): entry for entry in entries}  # of two of one name the later
            content = _digest(entries)
            if self._content not in (b"", content):
                raise DataError(f"{self.path}: the archive has changed while it was in use. Put it back.")
            self._content, self._process = content, os.getpid()
        return self._archive


def _leads_back(root: Path, prefix: str, name: str) -> bool:
    """Whether a link below ``root`` leads to a folder that it lies in, on the way that was taken to it."""
    path = root / prefix / name
    if not path.is_symlink():
        return False
    way = [root, *(root / above for above in Path(prefix).parents), root / prefix]
    target = os.path.realpath(path)
    return any(Path(os.path.realpath(folder)).is_relative_to(target) for folder in way)


def _normalised(name: str) -> str:
    """An archive's name for a file without what means nothing: ".", double slashes, Windows's backslashes."""
    *folders, file = name.replace("\\", "/").split("/")
    parts = [part for part in folders if part not in ("", ".")]
    return "/".join([*parts, "" if file == "." else file]) if parts else file


def _unsafe(name: str) -> str | None:
    """Why an archive's name for a file is not accepted, if so."""
    path = name.replace("\\", "/")
    if not (path.startswith("/") or ":" in path[:2] or ".." in path.split("/")):
        return None
    return (
        f"unsafe name '{name}': a name in an archive must be relative, and without '..' or a drive."
        f" Make the archive anew."
    )


def _unreadable(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry of an archive is not read, if so."""
    name = entry.filename
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


def _digest(entries: list[zipfile.ZipInfo]) -> bytes:
    """By which the content of an archive is known again: names, sizes and checksums."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        text = f"{entry.filename}\0{entry.file_size}\0{entry.CRC}\0"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.digest()


class FileSource(ImageSource):
    """One split of a tree of image files with a class each."""

    def __init__(self, tree: FileTree, split: Part, grey_range: GreyRange | None = None) -> None:
        layout = faultless(tree.find_layout(tree.names()), str(tree.path))
        items = layout.select(split, str(tree.path))
        super().__init__(
            os.path.basename(os.path.abspath(tree.path)), split, layout.classes, [item.label for item in items]
        )
        self.notes = layout.notes
        self.held_out = split in held_out_parts(layout.splits)
        self._tree = tree
        self._names = [item.name for item in items]
        self._grey_range = grey_range

    def image(self, index: int) -> Image.Image:
        """Image ``index``, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""
        name = self._names[index]
        return decode_image(self._tree.read(name), f"{self._tree.path}: '{name}'", grey_range=self._grey_range)

    def file_name(self, index: int) -> str:
        """Path of image ``index`` from the root of the folder or archive."""
        return self._names[index]
