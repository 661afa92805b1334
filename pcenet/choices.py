"""Values that several parts let a user choose from, and the suggestion for a misspelt word.

It imports nothing heavy, because the command line needs it before a command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Augment = Literal["auto", "crop", "resized_crop", "randaugment", "none"]
Split = Literal["train", "val", "test"]
Part = Literal["train", "val", "test", "all"]  # what can be measured of a set; all: whatever the split
TaskName = Literal["classify", "segment"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "bf16", "fp16", "fp32", "tf32"]
GreyRange = list[int]  # of grey images of more than 8 bits: the two values that are black and white
NOTHING_IGNORED = "none"
IgnoreIndex = int | str | None  # the mask value that does not count beside 255; NOTHING_IGNORED: all count, 255 too


# Options of layers that there were once, in saved networks, runs and records, and the value of each that is left; None:
# all values meant the same.
REMOVED = {"dispatch": None, "priority": "gate", "norm": "batch"}


def without_removed(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options that were saved, without those that there were once.

    Raises:
        ValueError: for one whose value no layer has any more; ``where`` is what the options are called.
    """
    for name, left in REMOVED.items():
        if left is not None and name in options and options[name] != left:
            raise ValueError(
                f"{where}: {name}={options[name]!r} was removed, {left!r} is all that is left; load it with the "
                "version that saved it"
            )
    return {name: value for name, value in options.items() if name not in REMOVED}


def did_you_mean(word: str, options: Iterable[str], similarity: float = 0.0) -> str:
    """``; did you mean 'x'?`` for the option spelt most like ``word``, to be put behind a message.

    Args:
        word: what the user wrote.
        options: what would have been right.
        similarity: from 0 to 1 (equal). By default the nearest option is named however far it is, which suits a
            closed list; where anything may have been meant, such as a path, ask for more.

    Returns:
        The text; empty where no option is as similar as that.
    """
    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=similarity)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def check_grey_range(value: Any) -> None:
    """Raise a ``ValueError`` unless it is None, or two whole numbers of which the second is higher."""
    if value is None:
        return
    numbers = isinstance(value, list | tuple) and all(type(number) is int for number in value)
    if not numbers or len(value) != 2 or not value[0] < value[1]:
        raise ValueError(
            "grey_range must be two whole numbers, the values of black and white, such as [0, 4095] for 12 bits,"
            f" got {value!r}"
        )
