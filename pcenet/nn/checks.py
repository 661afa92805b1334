"""Checks of arguments: a ValueError names the argument, its value and the rule."""

from __future__ import annotations


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """The value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_at_least(least: int, **arguments: int) -> None:
    """Every argument, given by its name, is a whole number and at least ``least``."""
    for name, value in arguments.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number and at least {least}")
