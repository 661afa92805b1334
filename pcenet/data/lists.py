"""Lists of images: a CSV file with a row for each, which tells its class or its mask, and perhaps its split.

::

    image,label,split
    photos/1.jpg,cat,train
    /data/pets/2.jpg,dog,val

Columns are known by their names (`COLUMNS`), others do not count. Paths are absolute, or begin at the list's folder.
Images are held out where there is no column of splits, or no ``val`` in it, as in `pcenet.data.class_folders`. A file
``classes.txt`` in the list's folder may name the classes of masks, as in `pcenet.data.mask_folders`.
"""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pcenet.choices import Split, did_you_mean
from pcenet.data.base import DataError, Fault
from pcenet.data.class_folders import Layout, check_classes, layout_of
from pcenet.data.files import FileTree, FolderTree
from pcenet.data.limits import LARGEST_FILE
from pcenet.data.mask_folders import CLASSES_FILE, MASK_SUFFIX, Pair, PairLayout
from pcenet.data.names import one_form
from pcenet.data.tree import SPLIT_FOLDERS, is_unread, unread_format
from pcenet.reading import check_regular

SUFFIX = ".csv"
# What the first row may call them, in any case.
COLUMNS = {
    "image": ("image", "image_path", "path", "file", "filename", "file_name"),
    "label": ("label", "class"),
    "mask": ("mask", "mask_path"),
    "split": ("split",),
}
SEPARATORS = ",;\t"


class Row(NamedTuple):
    """One image of a list: its line, the names of image and mask in the source, its class and split; "" is nothing."""

    line: int
    image: str
    mask: str
    label: str
    split: Split


class Content(NamedTuple):
    """What a list says: the usable rows, what is wrong with others, the `COLUMNS` that it has, its files' folder."""

    rows: list[Row]
    faults: list[Fault]
    columns: frozenset[str]
    folder: FolderTree


class ListTree(FileTree):
    """The images that a CSV file lists.

    A file's name is its path from the list's folder; where one is absolute, from the nearest folder around them all, so
    that no result names more of the machine than it has to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def content(self) -> Content:
        """What the list says. Raises ``DataError`` where it cannot be read, or has no column of images."""
        return read_list(self.path)

    def listing(self) -> tuple[list[str], list[Fault]]:
        """The files of all rows. A row that names none, or none that there is, or no split is a fault."""
        names = [name for row in self.content.rows for name in (row.image, row.mask) if name]
        return names, list(self.content.faults)

    def find_layout(self, names: Sequence[str]) -> tuple[Layout, list[Fault]]:
        """The classes and splits that the rows tell."""
        if fault := self.lack("label", "mask", "segment"):
            return Layout((), {}), [fault]
        faults = []
        splits: defaultdict[Split, defaultdict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for row in self.content.rows:
            if row.label:
                splits[row.split][row.label].append((row.image, row.image))
            else:
                faults.append(Fault(row.image, f"line {row.line}: '{row.image}' has no label. Give it one."))
        layout = layout_of(splits)
        check_classes(splits, layout.classes, faults, None)
        return layout, faults

    def find_pairs(self, names: Sequence[str], only: Split | None = None) -> tuple[PairLayout, list[Fault]]:
        """The masks and splits that the rows tell; where a row is of the split ``only``, none but these count."""
        if fault := self.lack("mask", "label", "classify"):
            return PairLayout({}, None), [fault]
        faults = []
        splits: dict[Split, list[Pair]] = {row.split: [] for row in self.content.rows}
        for row in self.content.rows:
            if row.mask:
                splits[row.split].append(Pair(row.image, row.mask, row.image))
            elif only not in splits or row.split == only:
                faults.append(Fault(row.image, f"line {row.line}: '{row.image}' has no mask. Give it one."))
        classes_file = os.path.relpath(self.path.parent / CLASSES_FILE, self.content.folder.path)
        return PairLayout(splits, classes_file if (self.path.parent / CLASSES_FILE).is_file() else None), faults

    def lack(self, column: str, other: str, task: str) -> Fault | None:
        """The fault of a list without a column; ``other`` is what it may have for another task."""
        if column in self.content.columns:
            return None
        hint = f" It has {other}s: the task for these is {task}." if other in self.content.columns else ""
        return Fault("", f"line 1: there is no column '{column}'.{hint}")

    def read(self, name: str) -> bytes:
        """The content of one file. Raises ``DataError`` where it cannot be read."""
        return self.content.folder.read(name)


def read_list(path: Path) -> Content:
    """Read a CSV file; it is in UTF-8, and its first row tells which separator it has.

    Raises:
        DataError: it cannot be read, or has no column of images.
    """
    try:
        check_regular(path, LARGEST_FILE)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the list is no text in UTF-8 ({error}). Save it as one.") from error
    except OSError as error:
        raise DataError(f"{path}: the list cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    separator = max(SEPARATORS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        titles = [title.strip() for title in next(reader, [])]
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}. Correct the quotes.") from error
    columns = find_columns(titles, path)
    faults = [
        Fault(
            "",
            f"line {line} has {len(cells)} cells, but line 1 has {len(titles)}. Give it as many; what holds a"
            f" '{separator}' stands in quotes.",
        )
        for line, cells in lines
        if len(cells) != len(titles)
    ]
    told = [
        (line, {column: cells[at] for column, at in columns.items()})
        for line, cells in lines
        if len(cells) == len(titles)
    ]
    folder, names = name_files({cells.get(kind, "") for _, cells in told for kind in ("image", "mask")}, path.parent)
    seen: dict[str, int] = {}
    rows = []
    for line, cells in told:
        image, mask = names[cells["image"]], names[cells.get("mask", "")]
        found = [*file_faults(image, mask, folder), *split_faults(cells)]
        if not found and (first := seen.setdefault(image, line)) != line:
            found.append(f"'{image}' is in line {first}, too. Remove one of them.")
        faults += [Fault(image, f"line {line}: {fault}") for fault in found]
        if not found:
            split = SPLIT_FOLDERS[cells["split"].lower()] if "split" in cells else "train"
            rows.append(Row(line, image, mask, one_form(cells.get("label", "")), split))
    return Content(rows, faults, frozenset(columns), FolderTree(folder))


def find_columns(titles: Sequence[str], path: Path) -> dict[str, int]:
    """The place of each of `COLUMNS` that there is. Raises ``DataError`` where none, or two, are the images'."""
    columns: dict[str, int] = {}
    for at, title in enumerate(titles):
        for column in (column for column, known in COLUMNS.items() if title.lower() in known):
            if column in columns:
                both = f"'{titles[columns[column]]}' and '{title}'"
                raise DataError(f"{path}: line 1: the columns {both} both mean '{column}'. Rename one.")
            columns[column] = at
    if "image" not in columns:
        there = ", ".join(f"'{title}'" for title in titles) or "nothing"
        hint = did_you_mean(next(iter(titles), ""), COLUMNS["image"])
        raise DataError(
            f"{path}: line 1 must name the columns: image, and label or mask, perhaps split; it has {there}{hint}."
        )
    return columns


def name_files(cells: Collection[str], folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder that all files of a list are looked for in, and the name there of each that a cell names."""
    normal = {cell: os.path.normpath(cell) if cell else "" for cell in cells}
    if not any(map(os.path.isabs, normal.values())):
        return folder, normal
    full = {cell: os.path.abspath(os.path.join(folder, cell)) for cell in cells if cell}
    root = os.path.commonpath({os.path.dirname(path) for path in full.values()})
    return Path(root), {"": ""} | {cell: os.path.relpath(path, root) for cell, path in full.items()}


def file_faults(image: str, mask: str, folder: Path) -> Iterator[str]:
    """What is wrong with the files that a row names."""
    if not image:
        yield "it names no image. Remove the row, or name one."
    if is_unread((image,)):
        yield unread_format(image).text
    if mask and not mask.lower().endswith(MASK_SUFFIX):
        yield f"'{mask}' is no PNG file. Masks are PNG files, which keep every value."
    for name in filter(None, (image, mask)):
        if not os.path.isfile(folder / name):  # Path.is_file raises an error for a name that is too long
            yield f"there is no file '{folder / name}'. Paths begin at the folder of the list, or are absolute."


def split_faults(cells: dict[str, str]) -> Iterator[str]:
    """What is wrong with the split that a row names."""
    split = cells.get("split", "train")
    if split.lower() not in SPLIT_FOLDERS:
        hint = did_you_mean(split, ("train", "val", "test"))
        yield f"the split is '{split}'; it must be train, val or test{hint}."
