"""Values by a schema, and files that are read again."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from pcenet.runs.schemas import (
    ANYTHING,
    COUNT,
    FIGURE,
    NUMBER,
    TEXT,
    Each,
    Maybe,
    Schema,
    misfit,
    or_none,
    read_json,
    read_text,
)

SCHEMA: Schema = {"a": [COUNT], "b": {"c": Each(NUMBER)}, "d": Maybe(or_none(TEXT))}
RIGHT = {"a": [0, 1], "b": {"c": {"x": 1.5}}, "more": object()}


@pytest.mark.parametrize(
    ("rule", "holds", "fails"),
    [
        (COUNT, [0, 7, 2**53 - 1], [-1, 2**53, 1.0, True, None, "1", []]),
        (NUMBER, [0, -1.5, 10**300], [math.nan, math.inf, -math.inf, 10**400, True, None, "1", 1j]),
        (FIGURE, [0, math.nan, math.inf], [10**400, True, None, "1"]),
        (TEXT, ["", "a"], [None, 1, b"a"]),
        (or_none(COUNT), [None, 0], [-1, ""]),
        (ANYTHING, [None, object()], []),
    ],
)
def test_rules(rule: Any, holds: list[Any], fails: list[Any]) -> None:
    assert all(misfit(value, rule, "x") is None for value in holds)
    assert all(misfit(value, rule, "x") is not None for value in fails)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (RIGHT, None),
        (RIGHT | {"d": None}, None),
        (RIGHT | {"a": (1,)}, None),
        (None, "it must be a mapping, got None"),
        ({}, "a is missing"),
        (RIGHT | {"a": "ab"}, "a must be a list, got 'ab'"),
        (RIGHT | {"a": [1, -1]}, "a[1] must be a whole number from 0 on, got -1"),
        (RIGHT | {"b": {}}, "b.c is missing"),
        (RIGHT | {"b": {"c": []}}, "b.c must be a mapping, got []"),
        (RIGHT | {"b": {"c": {"x": "y"}}}, "b.c.x must be a finite number, got 'y'"),
        (RIGHT | {"b": {"c": {5: 1}}}, "a key of b.c must be a text, got 5"),
        (RIGHT | {"d": 1}, "d must be a text or null, got 1"),
    ],
)
def test_what_does_not_follow_is_named(value: Any, said: str | None) -> None:
    assert misfit(value, SCHEMA, "") == said


def test_a_long_value_is_cut_short() -> None:
    assert len(misfit("x" * 10**6, COUNT, "x") or "") < 100


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        read_text(path)
    for content, said in (
        (b"\xff", "no text in UTF-8"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON .*Recursion"),
        (b"5" * 5000, "no JSON"),
        (b"[]", "it must be a mapping"),
        (b" " * 101, "101 bytes, and 100 at most"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_json(path, {}, 100 if b" " in content else 10**6)
    path.unlink()
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(ValueError, match="is no file"):
            read_text(path)
        path.rmdir() if path.is_dir() else path.unlink()
