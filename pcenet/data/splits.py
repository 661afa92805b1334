"""The deterministic, stratified split of a set that comes without one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pcenet.data.base import DataError


def hold_out(
    keys: Sequence[str], labels: Sequence[int], parts: Sequence[str], *, classes: Sequence[str], where: str
) -> dict[str, list[int]]:
    """Split a set into ``"train"`` and the held-out ``parts``, 10 % of every class for each part.

    Within a class the images are ranked by the SHA-256 of their key; the first tenth (rounded, at least one)
    goes to the first part, the next to the second, the rest to ``"train"``. So the split depends on neither
    order, machine nor seed, and an image that is added later moves hardly any other.

    Args:
        keys: a name for each image, unique within its class.
        labels: the class number of each image.
        parts: names of the held-out parts, such as ``("val", "test")``.
        classes: class names, for the error.
        where: what to call the set in the error.

    Returns:
        The indices of the images in each part, ascending.

    Raises:
        DataError: a class has too few images to give each part one.
    """
    members: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        members[label].append(index)
    split: dict[str, list[int]] = {part: [] for part in ("train", *parts)}
    for name, indices in zip(classes, members, strict=True):
        count = len(indices)
        if count <= len(parts):
            raise DataError(
                f"{where}: class '{name}' has {count} image(s), too few to give {', '.join(split)} one each."
                f" Add images, or sort them into the folders train, val and test yourself."
            )
        ranked = sorted(
            indices, key=lambda index: hashlib.sha256(keys[index].encode(errors="surrogateescape")).digest()
        )
        share = max(1, (count + 5) // 10)
        for number, part in enumerate(parts):
            split[part] += ranked[number * share : (number + 1) * share]
        split["train"] += ranked[len(parts) * share :]
    return {part: sorted(indices) for part, indices in split.items()}
