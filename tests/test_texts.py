"""What is data, and what is shown."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pcenet
from pcenet.texts import one_line, shown, valid


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("two  blanks", "two  blanks"),
        ("Käse 日本語 \N{OK HAND SIGN}", "Käse 日本語 \N{OK HAND SIGN}"),
        ("back\\slash", "back\\slash"),
        ("line\nbreak\r\ttab", "line\\nbreak\\r\\ttab"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("\u2066\u2069\u200b\u200d\ufeff", "\\u2066\\u2069\\u200b\\u200d\\ufeff"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\xa0\u3000", "\\xa0\\u3000"),
        ("\U000e0041", "\\U000e0041"),  # a tag, which nothing draws
        ("\x00\x7f", "\\x00\\x7f"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\udce9.png"),
    ],
)
def test_what_is_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


@given(st.text(st.characters()))
def test_whatever_is_shown_can_be_seen(text: str) -> None:
    seen = shown(text)
    assert shown(seen) == seen, "once is enough"
    assert len(seen.encode().decode().splitlines()) <= 1
    assert all(unicodedata.category(letter)[0] not in "CZ" or letter == " " for letter in seen)


@given(st.text(st.characters()))
def test_valid_text_changes_nothing_but_lone_surrogates(text: str) -> None:
    # JSON's escape of a surrogate, read as JSON reads it, gives the text back where it holds no such escape itself.
    written = valid(text)
    written.encode()
    if "\\u" not in text:
        assert re.sub(r"\\u(d[89a-f][0-9a-f]{2})", lambda found: chr(int(found[1], 16)), written) == text


def test_a_message_of_several_lines_is_one() -> None:
    assert one_line("  while parsing\n    in line 3:\r\n\n  a  b\n") == "while parsing in line 3: a  b"


@pytest.mark.timeout(10)
def test_a_long_message_takes_no_time() -> None:
    assert one_line("x" + " " * 300_000 + "\n" * 300_000 + "y") == "x y"


def test_only_one_place_prints() -> None:
    """What a print statement writes is not `shown`; rich's console is `pcenet.reporting.tables.Screen`."""
    root = Path(pcenet.__file__).parent
    call = re.compile(
        r"^\s*(?:print\(|sys\.std(?:out|err)\.write\()|[^.\w]Console\(|traceback\.print_exc\(", re.MULTILINE
    )
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if call.search(path.read_text())}
    assert found == {"texts.py"}
