"""Data sets of Hugging Face's library `datasets`, as its ``save_to_disk`` leaves them: images with a class each.

Columns are found by their types: the one `Image` and the one `ClassLabel`; of several the ones called ``image`` and
``label``. Names of splits, and holding out, are as in `pcenet.data.class_folders`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pcenet.choices import Split, did_you_mean
from pcenet.data.base import DataError, Fault
from pcenet.data.class_folders import Layout, check_classes, layout_of
from pcenet.data.files import FileTree
from pcenet.data.limits import LARGEST_FILE, file_fault
from pcenet.data.mask_folders import PairLayout
from pcenet.data.tree import SPLIT_FOLDERS
from pcenet.reading import check_regular

# The files by which a folder is known: of several splits, of one.
MARKS = (("dataset_dict.json",), ("state.json", "dataset_info.json"))


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has made this folder."""
    return any(all((folder / name).is_file() for name in names) for names in MARKS)


class SavedTree(FileTree):
    """A folder of ``save_to_disk``. An image's name is its split and its number there, such as ``train[12]``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def parts(self) -> Mapping[str, Any]:
        """The `datasets.Dataset` of each split, as rows of Arrow, which decode no image; one alone is ``train``.

        Raises ``DataError`` without the library, or where they cannot be read.
        """
        try:
            from datasets import Dataset, DatasetDict
        except ImportError as error:
            raise DataError(
                f"{self.path}: a saved data set needs the library datasets: pip install 'pcenet[datasets]'"
            ) from error
        try:
            several = check_files(self.path)
            kind = DatasetDict if several else Dataset  # not load_from_disk, which might choose what was not checked
            loaded = kind.load_from_disk(str(self.path))
            parts = loaded if several else {"train": loaded}
            for part in parts.values():
                part.data.validate(full=True)  # else offsets beyond a file's end would be read
        except Exception as error:  # whatever damaged files bring about
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{self.path}: the saved data set cannot be read ({reason}). Save it anew.") from error
        return {name: part.with_format("arrow") for name, part in parts.items()}

    def listing(self) -> tuple[list[str], list[Fault]]:
        """The images of all splits."""
        return [f"{name}[{row}]" for name, part in self.parts.items() for row in range(len(part))], []

    def find_layout(self, names: Sequence[str]) -> tuple[Layout, list[Fault]]:
        """The splits, and the classes in the order of the `ClassLabel`. A split without any label is left out."""
        faults, notes = [], []
        splits: dict[Split, defaultdict[str, list[tuple[str, str]]]] = {}
        classes: list[str] = []
        for name, part in self.parts.items():
            try:
                split = split_of(name, splits)
                column_of(part.features, "Image", "image")
                column = column_of(part.features, "ClassLabel", "label")
                classes = classes or part.features[column].names
                if part.features[column].names != classes:
                    raise DataError("its classes are not those of the split before it. Cast them to the same.")
            except DataError as error:
                faults.append(Fault(name, f"split '{name}': {error}"))
                continue
            labels = part.select_columns([column])[:].column(0).to_pylist()
            known = {row: label for row, label in enumerate(labels) if label in range(len(classes))}  # else None or -1
            if labels and not known:
                notes.append(Fault(name, f"the split '{name}' has no labels and is left out."))
                continue
            unknown = (f"{name}[{row}]" for row in range(len(labels)) if row not in known)
            faults += [Fault(image, f"'{image}' has no label. Give it one, or filter it out.") for image in unknown]
            by_class = splits[split] = defaultdict(list)
            for row, label in known.items():
                by_class[classes[label]].append((f"{name}[{row}]", str(row)))
        layout = layout_of(splits, notes, classes)
        check_classes(splits, classes, faults, None)
        return layout, faults

    def find_pairs(self, names: Sequence[str], only: Split | None = None) -> tuple[PairLayout, list[Fault]]:
        """None: images with masks are read from folders, archives and lists alone."""
        text = (
            "a saved data set has a class for each image: the task is classify. Give masks in a folder, .zip or .csv."
        )
        return PairLayout({}, None), [Fault("", text)]

    def read(self, name: str) -> bytes:
        """The file of one image. Raises ``DataError`` where the set holds its path alone."""
        split, _, row = name.removesuffix("]").rpartition("[")
        part = self.parts[split]
        column = column_of(part.features, "Image", "image")
        found = part[int(row)][column][0].as_py()
        if found is None:
            raise DataError(f"{self.path}: '{name}' has no image. Filter it out, or save the set anew.")
        data: bytes | None = found["bytes"]
        if data is None:
            raise DataError(
                f"{self.path}: '{name}' has no content, only a path. Save the set anew where its files are."
            )
        if fault := file_fault(len(data)):
            raise DataError(f"{self.path}: '{name}': {fault}")
        return data


def check_files(folder: Path) -> bool:
    """Whether a saved set has several splits. Refuse one that is made of files elsewhere, or of what has no end.

    Raises:
        ValueError: for these; OSError, TypeError, KeyError: for files that are damaged or lacking.
    """
    several = (folder / MARKS[0][0]).is_file()
    splits = read_json(folder / MARKS[0][0])["splits"] if several else ["."]
    for part, name in ((folder / split, split) for split in splits):
        check_file_name(name)
        for file in read_json(part / "state.json")["_data_files"]:
            check_file_name(file["filename"])
            check_regular(part / file["filename"])
            if not (part / file["filename"]).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{file['filename']!r} is a link to a file elsewhere")
    return several


def check_file_name(name: str) -> None:
    """Refuse a name that leads out of its folder."""
    if name != os.path.basename(name) or name == os.pardir:
        raise ValueError(f"{name!r} is no name of a file in it")


def read_json(path: Path) -> Any:
    """The content of a file of JSON."""
    check_regular(path, LARGEST_FILE)
    return json.loads(path.read_bytes())


def split_of(name: str, others: Collection[Split]) -> Split:
    """The split that a name means. Raises ``DataError`` where it means none, or one of ``others``."""
    split = SPLIT_FOLDERS.get(name.lower())
    if split is None:
        raise DataError(f"its name must be train, validation or test{did_you_mean(name, SPLIT_FOLDERS)}.")
    if split in others:
        raise DataError(f"another one means '{split}', too. Save the set with one of them.")
    return split


def column_of(features: Mapping[str, Any], kind: str, usual: str) -> str:
    """The column of this type; of several the one that has the usual name.

    Raises:
        DataError: there is none, or several of which none is called so.
    """
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) == 1 or usual in found:
        return found[0] if len(found) == 1 else usual
    if found:
        raise DataError(f"the columns {', '.join(found)} are of the type {kind}. Call the one that counts '{usual}'.")
    hint = " class_encode_column makes one of texts or numbers." if kind == "ClassLabel" else ""
    raise DataError(f"no column is of the type {kind}; there are {', '.join(features) or 'none'}.{hint}")
