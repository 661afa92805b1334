"""The deterministic, stratified split of a set that comes without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from pcenet.choices import Part, Split
from pcenet.data.base import DataError

T = TypeVar("T")


def select_split(
    splits: Mapping[Split, list[T]],
    split: Part,
    hold_out: Callable[[list[T], list[Split]], Mapping[str, list[int]]],
    *,
    where: str,
) -> list[T]:
    """The items of one split, held out of ``"train"`` where the set comes without ``"val"``; ``"all"``: of all splits.

    Args:
        splits: the splits that the set comes with.
        split: the one that is wanted.
        hold_out: splits the training items, given the names of the absent parts, into indices by part.
        where: what to call the set in the error.

    Raises:
        DataError: there is no such split and none to hold it out of.
    """
    if split == "all":
        return [item for items in splits.values() for item in items]
    parts = held_out_parts(splits)
    if parts and split in ("train", *parts):
        items = splits["train"]
        return [items[index] for index in hold_out(items, parts)[split]]
    if split not in splits:
        raise DataError(
            f"{where}: there is no split '{split}', only {', '.join(splits)}."
            f" Choose one of these, or add images for '{split}'."
        )
    return splits[split]


def held_out_parts(splits: Collection[Split]) -> list[Split]:
    """The parts that are held out of ``"train"`` in a set that comes with these splits."""
    absent: list[Split] = [part for part in ("val", "test") if part not in splits]
    return absent if "train" in splits and "val" in absent else []


def hold_out(
    keys: Sequence[str], labels: Sequence[int], parts: Sequence[str], *, classes: Sequence[str], where: str
) -> dict[str, list[int]]:
    """Split a set into ``"train"`` and the held-out ``parts``, 10 % of every class for each part.

    Every class is split by itself, see ``hold_out_alike``.

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
        within = hold_out_alike([keys[index] for index in indices], parts, where=f"{where}: class '{name}'")
        for part, numbers in within.items():
            split[part] += [indices[number] for number in numbers]
    return {part: sorted(indices) for part, indices in split.items()}


def hold_out_alike(keys: Sequence[str], parts: Sequence[str], *, where: str) -> dict[str, list[int]]:
    """Split images that do not differ in class into ``"train"`` and the held-out ``parts``, 10 % for each part.

    The images are ranked by the SHA-256 of their key; the first tenth (rounded, at least one) goes to the first
    part, the next to the second, the rest to ``"train"``. So the split depends on neither order, machine nor
    seed, and an image that is added later moves hardly any other.

    Args:
        keys: a name for each image, unique.
        parts: names of the held-out parts.
        where: what to call the images together in the error.

    Returns:
        The indices of the images in each part, ascending.

    Raises:
        DataError: there are too few images to give each part one.
    """
    count = len(keys)
    if count <= len(parts):
        raise DataError(
            f"{where} has {count} image(s), too few to give {', '.join(('train', *parts))} one each."
            f" Add images, or sort them into train, val and test yourself."
        )
    hashes = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys]
    ranked = sorted(range(count), key=hashes.__getitem__)
    share = max(1, (count + 5) // 10)
    split = {part: ranked[number * share : (number + 1) * share] for number, part in enumerate(parts)}
    split["train"] = ranked[len(parts) * share :]
    return {part: sorted(indices) for part, indices in split.items()}
