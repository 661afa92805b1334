"""By what the images of a run are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

Fingerprint = dict[str, list[Any]]
"""Of each split the number of images, and a digest of their names and labels."""


def fingerprint(sources: Mapping[Any, Any]) -> Fingerprint:
    """That of sources by the names of their splits; nothing is decoded."""
    found: Fingerprint = {}
    for split, source in sources.items():
        labels = getattr(source, "labels", None)
        names = hashlib.blake2b(digest_size=16)
        for index in range(len(source)):
            label = "" if labels is None else int(labels[index])
            names.update(f"{source.file_name(index)}\0{label}\0".encode(errors="surrogateescape"))
        found[split] = [len(source), names.hexdigest()]
    return found


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
    """How data differ from those of before, in words; None where they do not. Splits of one alone do not count."""
    for split in before.keys() & now.keys():
        (had, known), (has, names) = before[split], now[split]
        if had != has:
            return f"{split} had {had} images and has {has}"
        if known != names:
            return f"{split} has as many images, but not the same file names or labels"
    return None
