"""Values that several parts let a user choose from, and the suggestion for a misspelt word.

It imports nothing heavy, because the command line needs it before a command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

Augment = Literal["auto", "crop", "resized_crop", "randaugment", "none"]
Split = Literal["train", "val", "test"]
Task = Literal["classify", "segment"]


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
