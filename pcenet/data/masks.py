"""Masks: decoding them, and which of their values is which class; images with masks out of a folder or archive."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pcenet.choices import NOTHING_IGNORED, GreyRange, IgnoreIndex, Part
from pcenet.data.base import IGNORE, DataError, SegmentationSource, faultless
from pcenet.data.files import FileTree
from pcenet.data.grey import packing
from pcenet.data.images import decode, decode_image
from pcenet.data.limits import LARGEST_FILE
from pcenet.data.mask_folders import Pair, PairLayout
from pcenet.data.names import one_form
from pcenet.data.splits import held_out_parts
from pcenet.reading import check_regular

SPREAD = {"L;2": 85, "L;4": 17}  # by raw mode: the factor by which Pillow spreads grey over 0 to 255


def decode_mask(data: bytes, name: str) -> Image.Image:
    """Decode one mask to an upright image in mode L whose pixels are the file's values.

    Read are PNG files, grey (of 1, 2, 4, 8 or 16 bits) or with a palette, of which the index is the value. Other
    formats lose values (JPEG), or turn them round or scale them by what their header says.

    Args:
        data: the file's content.
        name: what to call the file in an error.

    Raises:
        DataError: as ``decode_image``; the mask is no PNG, has colours, or a value over 255.
    """
    return decode(data, name, _to_values, formats=("PNG",))


def _to_values(image: Image.Image) -> Image.Image:
    factor = SPREAD.get(packing(image)[0], 1)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "L":
        return image.point([value // factor for value in range(256)])
    if image.mode not in ("1", "P", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"its mode is {image.mode}; a mask has one channel of whole numbers, the class of each pixel:"
            f" save it as a grey or palette PNG, not as the colours that stand for the classes"
        )
    values = np.asarray(image)
    if values.max() > 255:
        raise ValueError(f"it has the value {values.max()}; the values of a mask are 0 to 255")
    return Image.fromarray(values.astype(np.uint8))


@dataclass(frozen=True)
class MaskClasses:
    """The classes of a set, and what each mask value stands for.

    Attributes:
        names: class names, by class number.
        values: the mask value of each class, ascending.
        ignored: the mask values that do not count; none where all do.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: frozenset[int]

    @property
    def table(self) -> list[int]:
        """The class number, or ``IGNORE``, of each of the 256 values."""
        numbers = {value: number for number, value in enumerate(self.values)}
        return [numbers.get(value, IGNORE) for value in range(256)]

    def fault(self, values: Iterable[int]) -> str | None:
        """What is wrong with a mask of these values, if anything."""
        unknown = [value for value in values if value not in self.values and value not in self.ignored]
        if not unknown:
            return None
        left_out = f"{listed(sorted(self.ignored))} do(es) not count" if self.ignored else "every value counts"
        return (
            f"the mask has the value(s) {listed(unknown)}, which are of no class: the classes are the values"
            f" {listed(self.values)}, and {left_out}. Correct the"
            f" mask, name the class (names stand for the values 0, 1, ...; without names each value of the masks for"
            f" training is a class), or choose ignore_index."
        )


class PairSource(SegmentationSource):
    """One split of a tree of images and masks."""

    def __init__(
        self,
        tree: FileTree,
        split: Part,
        pairs: Sequence[Pair],
        classes: MaskClasses,
        grey_range: GreyRange | None = None,
    ) -> None:
        super().__init__(os.path.basename(os.path.abspath(tree.path)), split, classes.names)
        self._tree = tree
        self._pairs = pairs
        self._mask_classes = classes
        self._table = classes.table
        self._grey_range = grey_range

    @property
    def mask_values(self) -> Sequence[int]:
        """The value of each class in the masks as they are stored, by class number."""
        return self._mask_classes.values

    @property
    def ignored_values(self) -> Sequence[int]:
        """The values of pixels that do not count, ascending."""
        return sorted(self._mask_classes.ignored)

    def __len__(self) -> int:
        return len(self._pairs)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, upright, in mode RGB. Raises ``DataError`` where it cannot be read."""
        name = self._pairs[index].image
        return decode_image(self._tree.read(name), self._label(name), grey_range=self._grey_range)

    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image ``index`` and its mask, see `SegmentationSource`."""
        name = self._pairs[index].mask
        image, mask = self.image(index), decode_mask(self._tree.read(name), self._label(name))
        fault = size_fault(image, mask) or self._mask_classes.fault(values_of(mask))
        if fault:
            raise DataError(f"{self._label(name)}: {fault}")
        return image, mask.point(self._table)

    def file_name(self, index: int) -> str:
        """Path of image ``index`` from the root of the folder or archive."""
        return self._pairs[index].image

    def _label(self, name: str) -> str:
        return f"{self._tree.path}: '{name}'"


def open_pairs(
    tree: FileTree,
    split: Part,
    *,
    classes: Sequence[str] | str | None,
    ignore_index: IgnoreIndex,
    grey_range: GreyRange | None = None,
    known: MaskClasses | None = None,
) -> PairSource:
    """Open one split of a tree; arguments and errors as for ``pcenet.data.open_segmentation_source``."""
    where = str(tree.path)
    # A trained network knows the classes: only what is measured need have masks.
    layout = faultless(tree.find_pairs(tree.names(), None if known is None or split == "all" else split), where)
    pairs = layout.select(split, where)
    source = PairSource(tree, split, pairs, mask_classes(tree, layout, classes, ignore_index, known), grey_range)
    source.notes = layout.notes
    source.held_out = split in held_out_parts(layout.splits)
    return source


def mask_classes(
    tree: FileTree,
    layout: PairLayout,
    classes: Sequence[str] | str | None,
    ignore_index: IgnoreIndex,
    known: MaskClasses | None = None,
) -> MaskClasses:
    """The classes of a set from the names that were given, from its own file, as they are known, or from its masks.

    Raises:
        DataError: ``ignore_index`` is no mask value, names are faulty, or there are fewer than two classes.
    """
    check_ignore_index(ignore_index)
    names = given_names(tree, layout, classes)
    if known is not None:
        names = names or dict(zip(known.values, known.names, strict=True))
        if ignore_index is None:
            # What does not count for the network may have the name of one of its classes here.
            kept = {value: name for value, name in names.items() if value not in known.ignored or name in known.names}
            return MaskClasses(tuple(kept.values()), tuple(kept), known.ignored - kept.keys())
    if names is None:
        names = named_by_value(values_of_training(tree, layout))
    found = number_classes(names, ignore_index, str(tree.path))
    if known is not None and isinstance(ignore_index, int):
        return replace(found, ignored=found.ignored | (known.ignored - set(found.values)))
    return found


def check_ignore_index(ignore_index: IgnoreIndex) -> None:
    """Raise a ``DataError`` unless it can be a mask value, or says that there is none."""
    if ignore_index in (None, NOTHING_IGNORED) or (isinstance(ignore_index, int) and 0 <= ignore_index <= IGNORE):
        return
    raise DataError(
        f"ignore_index must be a mask value from 0 to {IGNORE}, not {ignore_index}; or '{NOTHING_IGNORED}', with which"
        f" every value counts."
    )


def ignored_values(ignore_index: IgnoreIndex) -> frozenset[int]:
    """The mask values that do not count: 255 and a value that is given, or none of them."""
    if isinstance(ignore_index, str):
        return frozenset()
    return frozenset({IGNORE} if ignore_index is None else {IGNORE, ignore_index})


def given_names(tree: FileTree, layout: PairLayout, classes: Sequence[str] | str | None) -> dict[int, str] | None:
    """The names of the mask values, as given or out of the set's own file; None where there are none.

    Raises:
        DataError: they are faulty.
    """
    if classes is None and layout.classes_file:
        classes = parse_class_names(tree.read(layout.classes_file), f"{tree.path}: '{layout.classes_file}'")
    elif isinstance(classes, str):
        classes = read_class_names(classes)
    elif classes is not None:
        check_class_names(classes, "classes")
    return None if classes is None else dict(enumerate(classes))


def named_by_value(values: Iterable[int]) -> dict[int, str]:
    """Mask values as names of their own."""
    return {value: str(value) for value in sorted(values)}


def number_classes(names: Mapping[int, str], ignore_index: IgnoreIndex, where: str) -> MaskClasses:
    """The classes out of the names of the mask values, ascending by value.

    Raises:
        DataError: there are fewer than two, or more than class numbers can tell apart.
    """
    ignored = ignored_values(ignore_index)
    kept = {value: name for value, name in names.items() if value not in ignored}
    if len(kept) < 2:
        found = ", ".join(f"'{name}'" for name in kept.values()) or "none"
        left_out = f" (mask values {', '.join(map(str, sorted(ignored)))} do not count)" if ignored else ""
        lost = [value for value in names if value in ignored]
        ask = (
            f" Or {'is' if len(lost) == 1 else 'are'} {listed(sorted(lost))} a class, too? Then give --ignore-index"
            f" {NOTHING_IGNORED} (ignore_index), with which every value counts."
        )
        raise DataError(
            f"{where}: segmentation needs two or more classes, but there is {found}{left_out}. Give each class a value"
            f" of its own: 0, 1, ...{ask if lost else ''}"
        )
    if len(kept) > IGNORE:
        raise DataError(
            f"{where}: the masks have {len(kept)} values that count; there can be {IGNORE} classes at most."
        )
    return MaskClasses(tuple(kept.values()), tuple(kept), ignored)


def values_of(mask: Image.Image) -> list[int]:
    """The values that occur in an image of mode L, ascending."""
    return [value for value, count in enumerate(mask.histogram()) if count]


def size_fault(image: Image.Image, mask: Image.Image) -> str | None:
    """What is wrong with the size of a mask, if anything."""
    if mask.size == image.size:
        return None
    return (
        f"the mask has {mask.width} x {mask.height} pixels, but its image, turned upright as its EXIF data says, has"
        f" {image.width} x {image.height}. A mask has the size of its image: make it anew."
    )


def read_class_names(path: str | Path) -> list[str]:
    """Class names from a text file (UTF-8) with one name per line; the first line is mask value 0.

    Raises:
        ValueError: it is no regular file.
        DataError: the file cannot be read or is no text, is empty, has an empty line, or names a class twice.
    """
    try:
        check_regular(Path(path).expanduser(), LARGEST_FILE)
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file of class names cannot be read ({error.strerror}).") from error
    return parse_class_names(data, str(path))


def parse_class_names(data: bytes, where: str) -> list[str]:
    """`read_class_names` of a file's content; ``where`` names the file."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the file of class names is no text in UTF-8 ({error}). Save it as one.") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    check_class_names(names, where)
    return names


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raise a ``DataError`` unless ``names`` can name the mask values from 0 on; ``where`` says where they stand."""
    if not names:
        raise DataError(f"{where}: there are no class names. Write one per line, the first for mask value 0.")
    if len(names) > IGNORE:
        raise DataError(f"{where}: there are {len(names)} class names; mask values can name {IGNORE} at most.")
    for value, name in enumerate(names):
        if not name:
            raise DataError(f"{where}: the class name of mask value {value} (line {value + 1}) is empty. Give it one.")
        first = [one_form(other) for other in names].index(one_form(name))
        if first < value:
            raise DataError(
                f"{where}: the class name '{name}' stands for the mask values {first} and {value}."
                f" Give each value a name of its own."
            )


def values_of_training(tree: FileTree, layout: PairLayout) -> set[int]:
    """The values in all masks that came for training, before anything is held out."""
    if "train" not in layout.splits:
        raise DataError(
            f"{tree.path}: the classes are unknown, for they come from the masks for training and there are none. Name"
            f" them: classes, or a file classes.txt with a name per line, the first for mask value 0."
        )
    masks = (pair.mask for pair in layout.splits["train"])
    found = (values_of(decode_mask(tree.read(name), f"{tree.path}: '{name}'")) for name in masks)
    return set().union(*found)


def listed(values: Sequence[int]) -> str:
    """Such as "0-10, 12"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)
