"""Where the results go: a folder that nothing was in, one CSV and one JSON file, written as the predictions come."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from pcenet.inference.inputs import InputFile, LeftOut
from pcenet.training.folder import RunFolder


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
    """Gives each file a name for what is written for it, that no other has, also where case does not count."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, file: InputFile) -> str:
        """The name of a file without suffix; for one in a folder or archive with that and the path below it.

        Slashes separate; a number follows where the name is taken.
        """
        path = PurePosixPath(file.origin, file.name).with_suffix("")
        names = (str(path) if number == 1 else f"{path}-{number}" for number in count(1))
        name = next(name for name in names if name.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return name


class ResultFiles:
    """Writes ``predictions.csv`` and ``predictions.json``, whose names appear when both are complete.

    A context manager; after an error neither file is there.

    Args:
        folder: where to; it is made where it is missing.
        about: the entries with which the JSON file begins.
        columns: the names of the CSV file's columns.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], columns: Sequence[str]) -> None:
        self.csv, self.json = folder / "predictions.csv", folder / "predictions.json"
        self._about, self._columns = about, columns
        self._open_files = ExitStack()
        self._first = True
        self._left_out: list[LeftOut] = []

    def __enter__(self) -> Self:
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        self._json_file = self._open_files.enter_context(_temporary(self.json).open("w", encoding="utf-8"))
        csv_file = self._open_files.enter_context(_temporary(self.csv).open("w", encoding="utf-8", newline=""))
        self._csv_writer = csv.writer(csv_file)
        self._csv_writer.writerow(self._columns)
        head = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self._about.items()]
        self._json_file.write("{\n" + ",\n".join([*head, '"predictions": [']))
        return self

    def add(self, row: Row) -> None:
        """Write one prediction."""
        self._csv_writer.writerow(row.cells)
        self._json_file.write("\n" if self._first else ",\n")
        self._json_file.write(json.dumps(row.record, allow_nan=False))
        self._first = False

    def leave_out(self, files: Sequence[LeftOut]) -> None:
        """Note files that were not predicted; they come last in the JSON file."""
        self._left_out += files

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        paths = (self.csv, self.json)
        if error is None:
            left_out = ",\n".join(json.dumps(asdict(file)) for file in self._left_out)
            self._json_file.write(f'\n],\n"left_out": [\n{left_out}\n]\n}}\n')
        self._open_files.close()
        for path in paths:
            if error is None:
                os.replace(_temporary(path), path)
            else:
                _temporary(path).unlink(missing_ok=True)
        if error is not None:
            with suppress(OSError):  # not empty
                self.csv.parent.rmdir()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
