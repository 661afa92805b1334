"""What a file may say of a network: bounds of sizes, numbers and texts, checked before anything is made of them.

Every function raises a ``ValueError`` that names the entry, its value and the rule; the caller names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from pcenet.choices import TaskName

LARGEST_TEXT = 2**24  # bytes; the names of 21,000 classes take half a megabyte
LARGEST_NUMBER = 2**32  # of any kind
LARGEST_COUNT = 2**20  # of classes, channels, experts, blocks, pixels of a side ...
DEEPEST = 20  # lists and mappings inside each other; ours have 5
LARGEST_SIDE = 2**11  # pixels of an image that a network is made for
MOST_PATCH_PIXELS = 2**20  # 1024 x 1024; a map is padded to whole patches
LONGEST_NAME = 1000  # characters
LARGEST_MASK_VALUE = 2**16 - 1
MOST_PIXEL_CLASSES = 255

PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")
# Which layers timm makes anew for other channels or classes; we have no use for them.
ENDS = ("first_conv", "classifier")


def read_json(text: str | bytes) -> dict[str, Any]:
    """A mapping from JSON whose numbers, texts and depth are within bounds."""
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT} bytes")
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    if not isinstance(values, dict):
        raise ValueError(f"it must be a mapping, got {excerpt(values)}")
    check_values(values, "", LARGEST_NUMBER)
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_values(value: Any, where: str, largest: float, depth: int = DEEPEST) -> None:
    """No number above ``largest``, no long text and nothing deep in what JSON gave; ``where`` is what it is called."""
    if not depth:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if isinstance(value, str):
        _check_length(value, where)
    elif isinstance(value, int | float):
        if not abs(value) <= largest:
            raise ValueError(f"{where} {excerpt(value)} must be a number up to {largest}")
    elif isinstance(value, list):
        for each in value:
            check_values(each, where, largest, depth - 1)
    elif isinstance(value, dict):
        for key, each in value.items():
            _check_length(key, where)
            check_values(each, key, largest, depth - 1)


def _check_length(text: str, where: str) -> None:
    if len(text) > LONGEST_NAME:
        raise ValueError(f"{where} has a text of {len(text)} characters, {excerpt(text)}; {LONGEST_NAME} is the most")


def excerpt(value: Any) -> str:
    """The beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is a whole number from ``least`` to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_task(task: Any) -> TaskName:
    """A task by its name."""
    if task not in get_args(TaskName):
        raise ValueError(f"task {excerpt(task)} is not one of {', '.join(get_args(TaskName))}")
    return task


def check_num_classes(count: Any) -> int:
    """A number of classes; 0: there is no classifier."""
    if not is_whole(count, 0, LARGEST_COUNT):
        raise ValueError(f"num_classes {excerpt(count)} must be a whole number from 0 to {LARGEST_COUNT}")
    return int(count)


def check_pixel_classes(count: Any) -> int:
    """A number of classes of a pixel."""
    if check_num_classes(count) > MOST_PIXEL_CLASSES:
        raise ValueError(
            f"num_classes {count} must be at most {MOST_PIXEL_CLASSES} to segment: a mask has a byte for each pixel, "
            "and a value for those that do not count; merge classes"
        )
    return int(count)


def check_class_names(names: Any, count: int, entry: str = "class_names") -> list[str] | None:
    """Class names, one per class and each another; None where they are unknown. ``entry`` is what they are called."""
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{entry} must be {count} names, one per class, got {excerpt(names)}")
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        _check_length(name, f"{entry}: class {number}")
        if name in numbers:
            raise ValueError(
                f"{entry}: {excerpt(name)} stands for the classes {numbers[name]} and {number}; give each its own"
            )
        numbers[name] = number
    return names


def check_mask_values(values: Any, ignored: Any, count: int) -> tuple[list[int], list[int]] | None:
    """The mask value of each class, and those that do not count; None where both are unknown."""
    if values is None and ignored is None:
        return None
    for name, each in (("mask_values", values), ("ignored_values", ignored)):
        if not isinstance(each, list) or not all(is_whole(value, 0, LARGEST_MASK_VALUE) for value in each):
            raise ValueError(f"{name} must be whole numbers from 0 to {LARGEST_MASK_VALUE}, got {excerpt(each)}")
    if len(values) != count or len({*values, *ignored}) != len(values) + len(ignored):
        raise ValueError(
            f"mask_values must be {count} numbers, one per class, and no number may stand twice in mask_values and "
            f"ignored_values, got {excerpt(values)} and {excerpt(ignored)}"
        )
    return values, ignored


def check_preprocessing(values: Any) -> dict[str, Any]:
    """How images are prepared, with tuples where JSON has lists; entries that say something else are left out."""
    if not isinstance(values, dict):
        raise ValueError(f"the preprocessing must be a mapping, got {excerpt(values)}")
    kept = {
        key: tuple(values[key]) if isinstance(values[key], list) else values[key]
        for key in PREPROCESSING
        if key in values
    }
    if "input_size" in kept:
        check_image_shape(kept["input_size"])
    for name in ("mean", "std"):
        if name in kept:
            _check_per_channel(name, kept[name])
    if not isinstance(kept.get("interpolation", ""), str):
        raise ValueError(f"interpolation {excerpt(kept['interpolation'])} must be a text")
    if "crop_pct" in kept and not _is_positive(kept["crop_pct"]):
        raise ValueError(f"crop_pct {excerpt(kept['crop_pct'])} must be a number above 0")
    return kept


def check_image_shape(size: Any) -> None:
    """Channels, height and width of an image."""
    if (
        not isinstance(size, Sequence)
        or len(size) != 3
        or not is_whole(size[0], 1, LARGEST_COUNT)
        or not all(is_whole(side, 1, LARGEST_SIDE) for side in size[1:])
    ):
        raise ValueError(
            f"input_size {excerpt(size)} must be three whole numbers, channels, height and width, the latter of "
            f"{LARGEST_SIDE} pixels at most"
        )


def _check_per_channel(name: str, values: Any) -> None:
    positive = name == "std"
    if not isinstance(values, tuple) or not values or not all(_is_number(value) for value in values):
        raise ValueError(f"{name} {excerpt(values)} must be a list of numbers, one per channel")
    if positive and not all(map(_is_positive, values)):
        raise ValueError(f"{name} {excerpt(values)} must be numbers above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0
