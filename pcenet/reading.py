"""What is asked of a file before it is read. Imports nothing heavy, because the command line needs it early."""

from __future__ import annotations

import os
import stat


def check_regular(path: str | os.PathLike[str], at_most: int | None = None) -> None:
    """Refuse what could not be read to its end: a pipe waits for ever, a device such as ``/dev/zero`` has no end.

    Args:
        path: of the file; a link is followed.
        at_most: bytes that it may have; None: any number.

    Raises:
        ValueError: if it is no regular file, or larger; names it.
        OSError: if there is none, or if it cannot be looked at.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: it is no regular file. Remove it, or name a file.")
    if at_most is not None and about.st_size > at_most:
        raise ValueError(f"{path}: the file has {about.st_size} bytes, more than {at_most}. Shrink or remove it.")


def is_text(name: str) -> bool:
    """Whether a name is valid Unicode, which a name on a disk need not be."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
