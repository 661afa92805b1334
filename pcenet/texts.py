"""Texts from outside, such as the names of files and classes: what is data, and what is shown.

A name is a key, and a datum in a file, exactly as it is. JSON holds every name; where only valid Unicode can be written
it is `valid`. To people it is `shown`: on a terminal, in a picture, on a page. Nothing is ever looked up by that form.
"""

from __future__ import annotations

import io
import re
import sys
from typing import TextIO


def valid(text: str) -> str:
    r"""A text as valid Unicode. Bytes of a file's name that are no UTF-8 are written as JSON writes them, ``\udcXX``.

    >>> print(valid("caf\udce9.png"))
    caf\udce9.png
    """
    return text.encode(errors="backslashreplace").decode()


def shown(text: str) -> str:
    r"""A text as people may see it: one line of valid Unicode in which every character can be seen.

    What is not printable is written as in Python's strings: control characters, and with them the sequences that
    command a terminal; marks that turn the direction of writing; characters of no width; line breaks and blanks other
    than " "; bytes that are no UTF-8. What has been shown once stays as it is.

    >>> print(shown("photo\n\x1b[31m.png"))
    photo\n\x1b[31m.png
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(message: str) -> str:
    """A message as it is shown; a library's may have several lines, which a blank joins."""
    lines = map(str.strip, re.split(r"[\r\n]+", message))
    return shown(" ".join(filter(None, lines)))


def say(*lines: str, to: TextIO | None = None) -> None:
    """Print texts as they are `shown`, each on a line of its own. All that is not drawn by rich is printed here.

    Args:
        lines: the texts.
        to: where to; None: stdout.
    """
    print(*map(shown, lines), sep="\n", file=to, flush=True)


def print_whatever_comes() -> None:
    """Have stdout and stderr escape what their encoding lacks: a finished command must not fail over a name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
