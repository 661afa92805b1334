"""Values that several parts let a user choose from, and the suggestion for a misspelt word.

It imports nothing heavy, because the command line needs it before a command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Augment = Literal["auto", "crop", "resized_crop", "randaugment", "none"]
Split = Literal["train", "val", "test"]
Task = Literal["classify", "segment"]
GreyRange = Sequence[int]  # of an image of more than 8 bits: the values that become black and white
IgnoreIndex = int | Literal["none"] | None  # the mask value that does not count beside 255; "none": all count, 255 too
NOTHING_IGNORED: Literal["none"] = "none"


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
    numbers = isinstance(value, Sequence) and all(type(number) is int for number in value)
    if not numbers or len(value) != 2 or not value[0] < value[1]:
        raise ValueError(
            "grey_range must be two whole numbers, the values of black and white, such as [0, 4095] for 12 bits,"
            f" got {value!r}"
        )
