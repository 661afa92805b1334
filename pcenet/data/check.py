"""All faults of a data set at once: what training would refuse, and what it would pass over in silence.

This is ``pcenet check-data``. It applies the rules that loading applies (`class_folders`, `mask_folders`, `images`,
`masks`), but collects every violation instead of stopping at the first.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from PIL import Image

from pcenet.choices import GreyRange, IgnoreIndex, Split, TaskName, check_grey_range
from pcenet.data.base import IGNORE, DataError, Fault, ImageSource, SegmentationSource, Source
from pcenet.data.class_folders import Item, Layout
from pcenet.data.files import FileTree
from pcenet.data.findings import (
    CheckReport,
    Finding,
    Sample,
    SeenImage,
    duplicate,
    few_images,
    imbalance,
    little_grey,
    much_ignored,
    passed_over,
)
from pcenet.data.images import inspect_image
from pcenet.data.mask_folders import Pair, PairLayout
from pcenet.data.masks import (
    MaskClasses,
    check_ignore_index,
    decode_mask,
    given_names,
    named_by_value,
    number_classes,
    size_fault,
)
from pcenet.data.sources import SEGMENTATION_SOURCE_NAMES, SOURCE_NAMES, open_tree
from pcenet.data.splits import held_out_parts, hold_out_alike

Progress = Callable[[Sequence[Any]], Iterable[Any]]
E = TypeVar("E", Item, Pair)

TINY = 8  # pixels; a shorter side below is worth a warning
SAMPLES_PER_CLASS, SAMPLES, SAMPLE_SIDE = 8, 12, 192  # of the sample sheet: to classify; to segment; in pixels
QUICK_IMAGES, QUICK_SECONDS = 32, 0.4  # of each split; whichever is reached first


def check_data(
    source: str | Path,
    task: TaskName = "classify",
    *,
    classes: Sequence[str] | str | None = None,
    ignore_index: IgnoreIndex = None,
    grey_range: GreyRange | None = None,
    progress: Progress = iter,
) -> CheckReport:
    """Read a whole data set and report all that is wrong or odd.

    Args:
        source: the path of a data set, see ``open_source`` and ``open_segmentation_source``.
        task: ``"classify"`` or ``"segment"``.
        classes: for segmentation, see ``open_segmentation_source``.
        ignore_index: the same.
        grey_range: see ``open_source``.
        progress: wraps the list of the files that are read, for a progress bar.

    Raises:
        DataError: there is no such data set, or ``ignore_index`` is no mask value.
        ValueError: ``grey_range`` is no range.
    """
    if source in (*SOURCE_NAMES, *SEGMENTATION_SOURCE_NAMES):
        raise DataError(f"'{source}' comes with the program and needs no check. A folder of that name is './{source}'.")
    check_ignore_index(ignore_index)
    check_grey_range(grey_range)
    tree = open_tree(source)
    notes = _Notes(tree, grey_range)
    try:
        names, faults = tree.listing()
    except DataError as error:
        notes.refuse("unreadable", "", error)
        return CheckReport(str(source), task, findings=notes.sorted())
    notes.refuse_all("unreadable", faults)
    if task == "classify":
        return _check_classification(str(source), names, notes, progress)
    return _check_segmentation(str(source), names, notes, progress, classes, ignore_index)


def quick_check(sources: Mapping[Split, Source]) -> list[Finding]:
    """What can be found out about opened sources in less than a second, which is worth knowing before training.

    Opening has checked names, classes and splits. Here some images of each split are read, and training images
    counted.

    Args:
        sources: ``"train"`` and any others.

    Returns:
        Warnings.

    Raises:
        DataError: an image or a mask among those that were read is faulty.
    """
    train = sources["train"]
    findings = [passed_over(fault) for fault in train.notes]
    for split, source in sources.items():
        deadline = time.monotonic() + QUICK_SECONDS
        pixels: Counter[bool] = Counter()  # of the masks, by whether they count
        for index in _spread(range(len(source)), QUICK_IMAGES):
            if isinstance(source, SegmentationSource):
                histogram = source.mask(index).histogram()
                pixels.update({False: histogram[IGNORE], True: sum(histogram[:IGNORE])})
            else:
                source.image(index)
            if time.monotonic() > deadline:
                break
        if split == "train":
            findings += much_ignored(pixels[False], pixels.total())
    findings += few_images(len(train), train.classes)
    if isinstance(train, ImageSource):
        counts = Counter(train.labels)
        findings += imbalance({name: counts[number] for number, name in enumerate(train.classes)}, "classify")
    return findings


class _Notes:
    """What is found out about a set, file after file."""

    def __init__(self, tree: FileTree, grey_range: GreyRange | None) -> None:
        self.tree = tree
        self.grey_range = grey_range
        self.findings: list[Finding] = []
        self.sizes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.grey: list[tuple[int, int, int, int]] = []  # see `pcenet.data.images.Inspection`
        self._seen: dict[bytes, SeenImage] = {}
        self._texts: set[str] = set()

    def refuse(self, kind: str, file: str, fault: DataError | str) -> None:
        """An error: its text without the names of set and file where it begins with them.

        One of the set as a whole is left out where the same has been said of a part of it.
        """
        text = str(fault)
        for prefix in (f"{self.tree.path}/{file}: ", f"{self.tree.path}: ", f"{file}: ", f"'{file}': "):
            text = text.removeprefix(prefix)
        if file or text not in self._texts:
            self.findings.append(Finding("error", kind, file, text))
        self._texts.add(text)

    def refuse_all(self, kind: str, faults: Iterable[Fault]) -> None:
        """An error for each fault."""
        for fault in faults:
            self.refuse(kind, fault.file, fault.text)

    def image(self, split: str, file: str, label: str | None = None) -> Image.Image | None:
        """Read, judge and remember one image; None where it cannot be read."""
        try:
            data = self.tree.read(file)
            image, kind, oddities, grey = inspect_image(data, file, grey_range=self.grey_range)
        except DataError as error:
            self.refuse("broken image", file, error)
            return None
        self.sizes[f"{image.width} x {image.height}"] += 1
        self.kinds[kind] += 1
        self.grey += [grey] if grey else []
        self.findings += [Finding("warning", "odd image", file, f"{text}.") for text in oddities]
        if min(image.size) < TINY:
            text = f"it has {image.width} x {image.height} pixels, fewer than {TINY} in a side."
            self.findings.append(Finding("warning", "tiny image", file, text))
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        this = SeenImage(split, file, label, hashlib.sha256(data).digest())
        first = self._seen.setdefault(pixels, this)
        if first is not this:
            self.findings.append(duplicate(first, this))
        return image

    def mask(self, file: str) -> Image.Image | None:
        """Read one mask; None where it cannot be read."""
        try:
            return decode_mask(self.tree.read(file), file)
        except DataError as error:
            self.refuse("faulty mask", file, error)
            return None

    def sorted(self) -> tuple[Finding, ...]:
        """The findings, errors first, else in the order in which they came."""
        return tuple(sorted(self.findings, key=lambda finding: finding.severity))


def _check_classification(source: str, names: list[str], notes: _Notes, progress: Progress) -> CheckReport:
    layout, faults = notes.tree.find_layout(names)
    notes.refuse_all("names and folders", faults)
    notes.findings += [passed_over(fault) for fault in layout.notes]
    _refuse_small_classes(layout, notes)
    splits = _splits_of(layout, notes)
    by_class = _by_class(splits.get("train", [])).values()
    wanted = {item.name for items in by_class for item in _spread(items, SAMPLES_PER_CLASS)}
    samples = []
    for split, item in progress([(split, item) for split, items in splits.items() for item in items]):
        label = layout.classes[item.label]
        image = notes.image(split, item.name, label)
        if image and item.name in wanted:
            samples.append(Sample(item.name, label, _reduced(image)))
    totals = {split: Counter(item.label for item in items) for split, items in splits.items()}
    counts = {
        split: {name: total[label] for label, name in enumerate(layout.classes)} for split, total in totals.items()
    }
    notes.findings += little_grey(notes.grey)
    notes.findings += imbalance(counts.get("train", {}), "classify")
    return _report(source, "classify", layout.classes, splits, notes, counts=counts, samples=samples)


def _check_segmentation(
    source: str,
    names: list[str],
    notes: _Notes,
    progress: Progress,
    given: Sequence[str] | str | None,
    ignore_index: IgnoreIndex,
) -> CheckReport:
    layout, faults = notes.tree.find_pairs(names)
    notes.refuse_all("names and folders", faults)
    notes.findings += [passed_over(fault) for fault in layout.notes]
    splits = _splits_of(layout, notes)
    wanted = set(_spread(splits.get("train", []), SAMPLES))
    pixels: dict[str, dict[int, int]] = {}
    samples = []
    for split, pair in progress([(split, pair) for split, pairs in splits.items() for pair in pairs]):
        image, mask = notes.image(split, pair.image), notes.mask(pair.mask)
        if mask:
            pixels[pair.mask] = {value: count for value, count in enumerate(mask.histogram()) if count}
        if image and mask and (fault := size_fault(image, mask)):
            notes.refuse("faulty mask", pair.mask, fault)
        elif image and mask and pair in wanted:
            small = _reduced(image)
            samples.append(Sample(pair.image, None, small, mask.resize(small.size, Image.Resampling.NEAREST)))
    notes.findings += little_grey(notes.grey)
    classes = _classes_of(layout, notes, pixels, given, ignore_index)
    totals: Counter[int] = Counter()
    for histogram in pixels.values():
        totals.update(histogram)
    if classes is None:
        return _report(source, "segment", (), splits, notes, mask_values=totals)
    for file, histogram in pixels.items():
        if fault := classes.fault(histogram):
            notes.refuse("faulty mask", file, fault)
    counts = {split: _pixels_by_class(pairs, pixels, classes) for split, pairs in splits.items()}
    ignored = {split: _ignored_pixels(pairs, pixels, classes) for split, pairs in splits.items()}
    counted = sum(counts.get("train", {}).values())
    notes.findings += much_ignored(ignored.get("train", 0), ignored.get("train", 0) + counted, classes.ignored)
    notes.findings += few_images(len(splits.get("train", [])), classes.names)
    notes.findings += imbalance(counts.get("train", {}), "segment")
    table = classes.table
    numbered = [Sample(sample.file, None, sample.image, sample.mask.point(table)) for sample in samples if sample.mask]
    return _report(
        source,
        "segment",
        classes.names,
        splits,
        notes,
        counts=counts,
        samples=numbered,
        mask_values=totals,
        ignored=ignored,
    )


def _report(
    source: str,
    task: TaskName,
    classes: tuple[str, ...],
    splits: Mapping[str, Sequence[object]],
    notes: _Notes,
    *,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    samples: Sequence[Sample] = (),
    mask_values: Mapping[int, int] | None = None,
    ignored: Mapping[str, int] | None = None,
) -> CheckReport:
    return CheckReport(
        source,
        task,
        classes,
        images={split: len(items) for split, items in splits.items()},
        counts=counts or {},
        sizes=dict(notes.sizes.most_common()),
        kinds=dict(notes.kinds.most_common()),
        mask_values=dict(sorted((mask_values or {}).items())),
        ignored=ignored or {},
        findings=notes.sorted(),
        samples=tuple(samples),
    )


def _splits_of(layout: Layout | PairLayout, notes: _Notes) -> dict[str, list[Any]]:
    """The items of each split as training would choose them, or else as they come."""
    splits: dict[str, list[Any]] = {split: list(items) for split, items in layout.splits.items()}
    for split in get_args(Split):
        try:
            splits[split] = list(layout.select(split, str(notes.tree.path)))
        except DataError as error:
            if split != "test" and layout.splits:
                notes.refuse("names and folders", "", error)
    return splits


def _refuse_small_classes(layout: Layout, notes: _Notes) -> None:
    """Name every class that is too small to be split; choosing a split names only the first."""
    parts = held_out_parts(layout.splits)
    for label, items in _by_class(layout.splits["train"] if parts else []).items():
        name = layout.classes[label]
        try:
            hold_out_alike([item.key for item in items], parts, where=f"class '{name}'")
        except DataError as error:
            notes.refuse("names and folders", name, error)


def _by_class(items: Iterable[Item]) -> dict[int, list[Item]]:
    by_class: defaultdict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_class[item.label].append(item)
    return by_class


def _classes_of(
    layout: PairLayout,
    notes: _Notes,
    pixels: Mapping[str, Mapping[int, int]],
    given: Sequence[str] | str | None,
    ignore_index: IgnoreIndex,
) -> MaskClasses | None:
    """The classes as opening the set finds them, but from those training masks that can be read."""
    try:
        names = given_names(notes.tree, layout, given)
        if names is None:
            training = (pixels.get(pair.mask, {}) for pair in layout.splits.get("train", []))
            names = named_by_value({value for values in training for value in values})
        return number_classes(names, ignore_index, str(notes.tree.path))
    except DataError as error:
        notes.refuse("classes", "", error)
        return None


def _pixels_by_class(
    pairs: Sequence[Pair], pixels: Mapping[str, Mapping[int, int]], classes: MaskClasses
) -> dict[str, int]:
    total: Counter[int] = Counter()
    for pair in pairs:
        total.update(pixels.get(pair.mask, {}))
    return {name: total[value] for name, value in zip(classes.names, classes.values, strict=True)}


def _ignored_pixels(pairs: Sequence[Pair], pixels: Mapping[str, Mapping[int, int]], classes: MaskClasses) -> int:
    found = (pixels.get(pair.mask, {}).items() for pair in pairs)
    return sum(count for histogram in found for value, count in histogram if value in classes.ignored)


def _spread(items: Sequence[E | int], count: int) -> list[Any]:
    """Up to ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _reduced(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    return small
