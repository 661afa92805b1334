"""Checks of arguments: a ValueError names the argument, its value and the rule."""

from __future__ import annotations

from numbers import Real


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """The value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_at_least(least: int, **arguments: int) -> None:
    """Every argument, given by its name, is a whole number and at least ``least``."""
    for name, value in arguments.items():
        if not is_whole(value) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number and at least {least}")


def is_whole(value: object) -> bool:
    """Whether the value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether the value is a number that can be compared with others."""
    return isinstance(value, Real)
