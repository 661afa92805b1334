"""Reading again what a run wrote: files that are files and of a usual size, and values that have the form they need.

Between writing and reading anything may have happened to a file. What is read here is known to fit, or is an error that
says where it does not; whoever uses it need not look again.
"""

from __future__ import annotations

import json
import reprlib
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_TEXT = 2**26  # bytes; metrics.csv of thousands of epochs with hundreds of experts has less


@dataclass(frozen=True)
class Rule:
    """What a single value has to be.

    Attributes:
        says: what, in words that follow "must be".
        holds: whether a value is that; any value may come.
    """

    says: str
    holds: Callable[[Any], bool]


LARGEST = sys.float_info.max

ANYTHING = Rule("anything", lambda value: True)
TEXT = Rule("a text", lambda value: isinstance(value, str))
BOOLEAN = Rule("true or false", lambda value: type(value) is bool)
COUNT = Rule("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 2**53)
NUMBER = Rule("a finite number", lambda value: type(value) in (int, float) and abs(value) <= LARGEST)
FIGURE = Rule("a number", lambda value: type(value) is float or NUMBER.holds(value))


@dataclass(frozen=True)
class Each:
    """A mapping with any keys that follow one rule, whose values all follow one schema."""

    values: Schema
    keys: Rule = TEXT


@dataclass(frozen=True)
class Maybe:
    """An entry of a mapping that may be missing."""

    values: Schema


Schema = Rule | Each | dict[str, Any] | list[Any]
"""A rule, a mapping of needed entries to their schemas (others may be there), or a list of one schema for all parts."""


def or_none(rule: Rule) -> Rule:
    """The same, or None."""
    return Rule(f"{rule.says} or null", lambda value: value is None or rule.holds(value))


def misfit(value: Any, schema: Schema, name: str) -> str | None:
    """The first thing in which a value does not follow a schema, as a sentence; None where it does.

    Args:
        value: anything.
        schema: what it should be.
        name: how to call it; empty: by what is in it alone.
    """
    if isinstance(schema, Rule):
        return None if schema.holds(value) else f"{name} must be {schema.says}, got {reprlib.repr(value)}"
    if not isinstance(value, list | tuple if isinstance(schema, list) else dict):
        said = "a list" if isinstance(schema, list) else "a mapping"
        return f"{name or 'it'} must be {said}, got {reprlib.repr(value)}"
    if isinstance(schema, dict):
        needed = (key for key, rule in schema.items() if not isinstance(rule, Maybe))
        if (missing := next((key for key in needed if key not in value), None)) is not None:
            return f"{below(name, missing)} is missing"
    parts = parts_of(value, schema, name)
    return next((found for path, part, rule in parts if (found := misfit(part, rule, path))), None)


def parts_of(value: Any, schema: Each | dict[str, Any] | list[Any], name: str) -> Iterator[tuple[str, Any, Schema]]:
    """The parts of a list or mapping, each with its name before it and its schema behind it."""
    if isinstance(schema, list):
        yield from ((f"{name}[{index}]", part, schema[0]) for index, part in enumerate(value))
    elif isinstance(schema, Each):
        for key, part in value.items():
            yield f"a key of {name or 'it'}", key, schema.keys
            yield below(name, key), part, schema.values
    else:
        for key, rule in schema.items():
            if key in value:
                yield below(name, key), value[key], rule.values if isinstance(rule, Maybe) else rule


def below(name: str, key: Any) -> str:
    """The name of an entry of a mapping."""
    return f"{name}.{key}" if name else str(key)


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The content of a text file in UTF-8. A pipe or a device is not opened: it might never end.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no file, larger than usual, or no text, in words that follow its name.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("is no file")
    if about.st_size > largest:
        raise ValueError(f"has {about.st_size} bytes, and {largest} at most are usual")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read: it is no text in UTF-8 ({error})") from error


def read_json(path: Path, schema: Schema = ANYTHING, largest: int = LARGEST_TEXT) -> Any:
    """What a JSON file holds, which follows a schema.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file, in words that follow its name.
    """
    text = read_text(path, largest)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: it is no JSON ({type(error).__name__}: {error})") from error
    if fault := misfit(content, schema, ""):
        raise ValueError(f"cannot be used: {fault}")
    return content
