"""Where the results go: a folder that nothing was in, one CSV and one JSON file, written as the predictions come."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from pcenet.inference.inputs import InputFile, LeftOut
from pcenet.runs.folder import RunFolder
from pcenet.texts import valid

CSV, JSON = "predictions.csv", "predictions.json"
LONGEST_NAME, LONGEST_PATH = 200, 1000  # bytes of what masks are called; systems take 255 and some thousand


@dataclass(frozen=True)
class Row:
    """What was predicted for one file.

    Attributes:
        cells: the row in the CSV file.
        record: the same, and what does not fit into a table, for the JSON file.
        shown: the row in the table on the terminal.
    """

    cells: Sequence[str | float]
    record: Mapping[str, Any]
    shown: Sequence[str]


def output_folder(out: str | None, default: str) -> Path:
    """``out``, or the first of ``default``, ``default-2`` ... that nothing is in; it need not exist.

    Raises:
        ValueError: if ``out`` is a file, or a folder with something in it.
    """
    if out is None:
        folders = (Path(default if number == 1 else f"{default}-{number}") for number in count(1))
        return next(folder for folder in folders if RunFolder(folder).free)
    if not RunFolder(Path(out)).free:
        raise ValueError(f"out: {out} exists and is never overwritten; choose a new or an empty folder with --out")
    return Path(out)


class OutputNames:
    """Gives each file a name for what is written for it, that no other has, also where case and Unicode's forms of one
    letter do not count.

    Args:
        suffixes: what will be written, which no folder may be called.
    """

    def __init__(self, suffixes: Sequence[str]) -> None:
        self._suffixes = tuple(suffixes)
        self._taken: set[str] = set()

    def take(self, file: InputFile) -> str:
        """The name of a file without suffix; for one in a folder or archive with that and the path below it.

        Slashes separate; a number follows where the name is taken. Longer names than a disk takes are cut.
        """
        path = PurePosixPath(file.origin, file.name).with_suffix("")
        *folders, last = map(_cut, path.parts)
        folders = [f"{part}_" if part.lower().endswith(self._suffixes) else part for part in folders]
        stem = "/".join([*folders, last])
        stem = stem if len(os.fsencode(stem)) <= LONGEST_PATH else last
        names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        name = next(name for name in names if _folded(name) not in self._taken)
        self._taken.add(_folded(name))
        return name


def _cut(part: str) -> str:
    """A part of a path that leaves room for a number and a suffix."""
    content = os.fsencode(part)
    return content[:LONGEST_NAME].decode(errors="ignore") if len(content) > LONGEST_NAME else part


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


class ResultFiles:
    """Writes ``predictions.csv`` and ``predictions.json`` as the predictions come. A context manager.

    Names are written as they are; in the CSV file, which is UTF-8, those that are not by `pcenet.texts.valid`.

    Args:
        folder: where to.
        about: the entries with which the JSON file begins.
        columns: the names of the CSV file's columns.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], columns: Sequence[str]) -> None:
        self._folder, self._about, self._columns = folder, about, columns
        self._open_files = ExitStack()
        self._first = True
        self._left_out: list[LeftOut] = []

    def __enter__(self) -> Self:
        csv_file = self._open_files.enter_context((self._folder / CSV).open("w", encoding="utf-8", newline=""))
        self._csv_writer = csv.writer(csv_file)
        self._write_cells(self._columns)
        self._json_file = self._open_files.enter_context((self._folder / JSON).open("w", encoding="utf-8"))
        head = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self._about.items()]
        self._json_file.write("{\n" + ",\n".join([*head, '"predictions": [']))
        return self

    def add(self, row: Row) -> None:
        """Write one prediction."""
        self._write_cells(row.cells)
        self._json_file.write("\n" if self._first else ",\n")
        self._json_file.write(json.dumps(row.record, allow_nan=False))
        self._first = False

    def leave_out(self, files: Sequence[LeftOut]) -> None:
        """Note files that were not predicted; they come last in the JSON file."""
        self._left_out += files

    def _write_cells(self, cells: Sequence[str | float]) -> None:
        self._csv_writer.writerow([valid(cell) if isinstance(cell, str) else cell for cell in cells])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._open_files:
            if error is None:
                left_out = ",\n".join(json.dumps(asdict(file)) for file in self._left_out)
                self._json_file.write(f'\n],\n"left_out": [\n{left_out}\n]\n}}\n')
