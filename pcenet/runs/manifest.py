"""Folders that can be trusted: flushed to the disk, with the size and the SHA-256 of every file in a manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pcenet.runs.schemas import COUNT, TEXT, Each, read_json
from pcenet.writing import TEMPORARY, flush

MANIFEST = "manifest.json"
STATE = "state.ckpt"  # the file of a checkpoint that holds everything
LARGEST_MANIFEST = 2**16  # bytes; it names one file
FILES = {"files": Each({"bytes": COUNT, "sha256": TEXT})}


def seal(folder: Path) -> None:
    """Flush every file of a folder to the disk and write the manifest, with the size and the digest of each."""
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_of(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words that follow its name; None where it is intact.

    Whatever lies there, nothing is opened that might never end, such as a pipe.
    """
    if folder.name.endswith(TEMPORARY):
        return "is what a write left that did not finish"
    if not folder.is_dir():
        return "is no checkpoint of pcenet train, which is a folder"
    try:
        return _fault_within(folder)
    except OSError as error:
        name = Path(error.filename or folder).name
        return f"is damaged: {name} cannot be read ({error.strerror or type(error).__name__})"


def _fault_within(folder: Path) -> str | None:
    try:
        files = read_json(folder / MANIFEST, FILES, LARGEST_MANIFEST)["files"]
    except FileNotFoundError:
        return f"is damaged: {MANIFEST} is missing"
    except ValueError as error:
        return f"is damaged: {MANIFEST} {error}"
    for name, about in files.items():
        file = folder / Path(name).name  # never a file elsewhere
        if not file.is_file():
            return f"is damaged: {name} is missing"
        if (found := file.stat().st_size) != about["bytes"]:
            return f"is damaged: {name} has {found} of {about['bytes']} bytes"
        if digest(file) != about["sha256"]:
            return f"is damaged: the SHA-256 of {name} is not that of {MANIFEST}"
    return None if STATE in files else f"is damaged: {MANIFEST} does not name {STATE}"
