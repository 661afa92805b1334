"""Names of files and folders: which of them are no data, when two are the same, and in what two differ.

A file is opened by its exact name. Names are compared in one Unicode form, NFC: macOS writes the letter "é" as two
characters (NFD), Windows and Linux as one, and both look alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping

# What operating systems, file managers and network storage leave in folders, in lower case. Names that begin with a
# dot never count, so .DS_Store, .AppleDouble, ._1.jpg, .Trash-1000, .@__thumb, .snapshot and the like are not listed.
SYSTEM_NAMES = frozenset(
    {
        # Windows
        "$recycle.bin",
        "desktop.ini",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "system volume information",
        "thumbs.db",
        # macOS
        "__macosx",
        "desktop db",
        "desktop df",
        "icon\r",
        "network trash folder",
        "temporary items",
        "thevolumesettingsfolder",
        # Linux
        "lost+found",
        # Synology, QNAP, NetApp
        "#recycle",
        "#snapshot",
        "@__thumb",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@sharebin",
        "@sharesnap",
        "@tmp",
        "~snapshot",
    }
)


_FOUND = re.compile(r"found\.\d{3}")  # Windows's, after it has checked a disk


def is_visible(parts: Iterable[str]) -> bool:
    """Whether none of a path's parts is hidden or left by a system (`SYSTEM_NAMES`)."""
    return not any(
        part.startswith(".") or part.lower() in SYSTEM_NAMES or _FOUND.fullmatch(part.lower()) for part in parts
    )


def one_form(name: str) -> str:
    """The form in which names are compared: NFC."""
    return unicodedata.normalize("NFC", name)


def _plain_space(name: str) -> str:
    """White space as single blanks between words, without characters that have no width."""
    return " ".join("".join(letter for letter in name if unicodedata.category(letter) != "Cf").split())


# What two names that look alike, or almost, may differ in.
_ASPECTS: dict[str, Callable[[str], str]] = {
    "Unicode form": one_form,
    "white space": _plain_space,
    "case": str.casefold,
}


def look(name: str) -> str:
    """What a name looks like: equal for two names that a reader cannot tell apart."""
    return one_form(_plain_space(name))


def difference(one: str, other: str) -> str:
    """In what two names differ that are alike otherwise, such as "case" or "Unicode form and white space".

    Returns:
        The text; empty where they are equal or not alike.
    """
    if one == other or bare(one) != bare(other):
        return ""
    return " and ".join(aspect for aspect in _ASPECTS if bare(one, keep=aspect) != bare(other, keep=aspect))


def bare(name: str, keep: str = "") -> str:
    """A name without all that `difference` tells: what two names that are alike have in common.

    Args:
        name: the name.
        keep: an aspect that stays as it is.
    """
    for aspect, form in _ASPECTS.items():
        if aspect != keep:
            name = form(name)
    return name


def nearly(name: str, others: Mapping[str, str]) -> str:
    """A hint, to be put behind a message, at a name that is nearly ``name``; empty where there is none.

    Args:
        name: what was looked for.
        others: the names that are there, by what is `bare` of them.
    """
    other = others.get(bare(name), name)
    aspect = difference(name, other)
    return f" There is '{other}', which differs in {aspect}: rename one of them." if aspect else ""
