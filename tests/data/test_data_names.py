"""Which names are no data, when two are the same, and in what two differ."""

from __future__ import annotations

import pytest

from pcenet.data.names import bare, difference, is_visible, look, nearly, one_form
from pcenet.reading import is_text

LITTER = [
    *(
        "found.000",
        "FOUND.017",
        "@eaDir",
        "#recycle",
        "#snapshot",
        "@tmp",
        "@Recycle",
        "@Recently-Snapshot",
        ".@__thumb",
        "~snapshot",
    ),
    *("$RECYCLE.BIN", "System Volume Information", "FOUND.000", "Thumbs.db", "thumbs.db", "ehthumbs.db", "Desktop.ini"),
    *("__MACOSX", ".AppleDouble", ".DS_Store", "._1.jpg", ".Spotlight-V100", ".Trashes", "Icon\r", "Temporary Items"),
    *("lost+found", ".Trash-1000", ".directory", ".nfs0001", ".ipynb_checkpoints", ".git"),
]


@pytest.mark.parametrize("name", LITTER)
def test_what_systems_leave_does_not_count_in_any_case_at_any_depth(name: str) -> None:
    for spelling in (name, name.upper(), name.lower()):
        assert not is_visible((spelling,))
        assert not is_visible(("train", spelling, "cat", "1.jpg"))
        assert not is_visible(("train", "cat", spelling))


@pytest.mark.parametrize(
    "name", ["icon", "recycle", "recycled", "recycler", "tmp", "thumbs", "found", "a.b", "cat.", "1.jpg", ""]
)
def test_ordinary_names_count(name: str) -> None:
    assert is_visible(("train", name))


COMPOSED, DECOMPOSED = "Caf\u00e9", "Cafe\u0301"


@pytest.mark.parametrize(
    ("one", "other", "aspects"),
    [
        ("cat", "cat", ""),
        ("cat", "dog", ""),
        (COMPOSED, DECOMPOSED, "Unicode form"),
        ("cat", "Cat", "case"),
        ("red fox", "red  fox", "white space"),
        ("cat", "cat ", "white space"),
        ("red fox", "red\u00a0fox", "white space"),
        ("cat", "ca\u200bt", "white space"),
        ("STRASSE", "stra\u00dfe", "case"),
        (f"{COMPOSED} ", DECOMPOSED, "Unicode form and white space"),
        (f"{COMPOSED} ", DECOMPOSED.upper(), "Unicode form and white space and case"),
        (COMPOSED, "Cafe", ""),
    ],
)
def test_in_what_two_names_differ(one: str, other: str, aspects: str) -> None:
    assert difference(one, other) == difference(other, one) == aspects
    hint = f" There is '{other}', which differs in {aspects}: rename one of them." if aspects else ""
    assert nearly(one, {bare(name): name for name in ("else", other)}) == hint


def test_names_are_compared_in_one_form() -> None:
    assert one_form(COMPOSED) == one_form(DECOMPOSED) == COMPOSED
    assert look("a  b\u200b ") == look("a b")
    assert look("A") != look("a")


def test_bytes_that_are_no_text() -> None:
    assert is_text(COMPOSED)
    assert is_text("\U0001f431")
    assert not is_text(b"caf\xe9".decode(errors="surrogateescape"))
