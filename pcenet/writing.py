"""Writing files: whole or not there, with errors that name the path.

What is written goes to a temporary place first and gets its name at the end; after an error, such as a full disk,
nothing of it is left, so that the same command works when there is room.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"  # how the names of what is being written, or removed, end
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a write raises, which knows no name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` where the block writes a file or a folder; flushed to the disk, it takes ``path``'s place.

    ``path`` is complete or absent at any moment; a folder that was there is replaced by a folder alone.

    Raises:
        IsADirectoryError: if a file would take a folder's place.
        OSError: naming ``path``, or a file below it; what was there before is still there.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with naming(temporary, path):
        remove(temporary)
        try:
            yield temporary
            if path.is_dir() and not temporary.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            for written in (*temporary.rglob("*"), temporary):
                flush(written)
            if os.path.lexists(path) and (temporary.is_dir() or path.is_dir()):
                discard(path)  # nothing but a file can be replaced, and by a file only
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                remove(temporary)
            raise
        flush(path.parent)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` where the block writes; at its end all that lies there moves up into ``folder``.

    ``folder`` is made where it is missing, and removed again after an error.

    Raises:
        OSError: naming ``folder``, or a file below it; nothing new is there.
    """
    temporary = folder / f".{secrets.token_hex(4)}{TEMPORARY}"
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with naming(temporary, folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.iterdir(), key=Path.is_file):
                os.replace(path, folder / path.name)
            temporary.rmdir()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # not empty
                for each in missing:
                    each.rmdir()
            raise


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file or folder, then give it the name ``path``, see `replacing`."""
    with replacing(path) as temporary:
        write(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically; a pipe or a device gets the content and stays what it is."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(content)
        return
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically. NaN and infinity are errors: JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def naming(temporary: Path, path: Path) -> Iterator[None]:
    """Errors of writing to ``temporary`` name ``path``, or what is to lie below it.

    A write that fails knows no name by itself, and torch hides its error behind one of its own.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        found = cause.filename2 or cause.filename
        if found is None and cause.errno in OF_WRITING:
            found = temporary
        if found is None or not Path(os.fsdecode(found)).is_relative_to(temporary):
            raise
        raise OSError(
            cause.errno, cause.strerror, str(path / Path(os.fsdecode(found)).relative_to(temporary))
        ) from error


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a folder, or what lies in its place; it loses its name first: at no moment is a part of it seen under
    that."""
    temporary = path.with_name(f"{path.name}.old{TEMPORARY}")  # not the name of what may replace it
    remove(temporary)
    os.replace(path, temporary)
    remove(temporary)


def remove(path: Path) -> None:
    """Remove whatever has a name, if anything: a folder with all in it, a link without what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
