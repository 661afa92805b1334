"""All faults of a data set at once: what training would refuse, and what it would pass over in silence.

The rules are those of the sources themselves (``layout``, ``pairs``, ``images``, ``masks``); here none of them stops
the search.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from PIL import Image

from pcenet.choices import NOTHING_IGNORED, GreyRange, IgnoreIndex, Split, TaskName, check_grey_range
from pcenet.data.base import IGNORE, DataError, Fault, ImageSource, SegmentationSource, Source
from pcenet.data.files import FileTree
from pcenet.data.grey import way_out
from pcenet.data.images import decode_mask, inspect_image
from pcenet.data.layout import Item, Layout, find_layout
from pcenet.data.masks import (
    MaskClasses,
    check_ignore_index,
    given_names,
    listed,
    named_by_value,
    number_classes,
    size_fault,
)
from pcenet.data.pairs import Pair, PairLayout, find_pairs
from pcenet.data.sources import SEGMENTATION_SOURCE_NAMES, SOURCE_NAMES, open_tree
from pcenet.data.splits import held_out_parts, hold_out_alike

Severity = Literal["error", "warning"]
Progress = Callable[[Sequence[Any]], Iterable[Any]]
E = TypeVar("E", Item, Pair)

TINY = 8  # pixels; a shorter side below is worth a warning
IMBALANCE: dict[TaskName, int] = {"classify": 10, "segment": 100}  # so many times rarer is worth a warning
MANY_IGNORED = 0.2  # of the pixels of the masks; more that do not count are worth a warning
LITTLE_GREY = 0.5  # of the range of deep grey images; a set that uses less is worth a warning
SAMPLES_PER_CLASS, SAMPLES, SAMPLE_SIDE = 8, 12, 192  # of the sample sheet: to classify; to segment; in pixels
QUICK_IMAGES, QUICK_SECONDS = 32, 0.4  # of each split; whichever is reached first


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        severity: ``"error"``: training would fail; ``"warning"``: it would not.
        kind: what sort of thing, in a few words, the same for all alike.
        file: the file or folder, from the root of the data set; empty where it is the set as a whole.
        message: what is the matter, and the way out.
    """

    severity: Severity
    kind: str
    file: str
    message: str


@dataclass(frozen=True)
class Sample:
    """A picture of the sample sheet, reduced to a side of 192 pixels at most.

    Attributes:
        file: its name.
        label: its class; None in segmentation.
        image: in mode RGB.
        mask: in segmentation, of the image's size: class numbers, or ``IGNORE``.
    """

    file: str
    label: str | None
    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds, and what is wrong with it.

    Attributes:
        source: its path.
        task: what it was checked for.
        classes: class names, by class number; empty where they could not be found out.
        images: images per split, as training would see the splits.
        counts: per split and class the images, or in segmentation the pixels.
        sizes: how many images have which size, width x height, upright; the most frequent first.
        kinds: how many images have which format and mode, such as "JPEG RGB"; the most frequent first.
        mask_values: pixels of each value in the masks.
        ignored: per split the pixels of the masks that do not count.
        findings: errors first.
        samples: training images for the sample sheet.
    """

    source: str
    task: TaskName
    classes: tuple[str, ...] = ()
    images: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    mask_values: Mapping[int, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @property
    def usable(self) -> bool:
        """Whether training would accept the set, which it does if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def shares(self) -> dict[str, float]:
        """Each class's share of the training images, or pixels that count."""
        counts = self.counts.get("train", {})
        return {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}

    def to_json(self) -> dict[str, Any]:
        """The report without its pictures, as what JSON can hold."""
        values = {name: value for name, value in vars(self).items() if name not in ("findings", "samples")}
        findings = [asdict(finding) for finding in self.findings]
        return values | {"usable": self.usable, "shares": self.shares, "findings": findings}


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
        source: a folder or ``.zip``.
        task: ``"classify"`` (a folder per class) or ``"segment"`` (images and masks).
        classes: for segmentation, see ``open_segmentation_source``.
        ignore_index: the same.
        grey_range: see ``open_source``.
        progress: wraps the list of the files that are read, for a progress bar.

    Raises:
        DataError: there is no such folder or ``.zip``, or ``ignore_index`` is no mask value.
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
    findings = [_note(fault) for fault in train.notes]
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
            findings += _much_ignored(pixels[False], pixels.total())
    findings += _few_images(len(train), train.classes)
    if isinstance(train, ImageSource):
        counts = Counter(train.labels)
        findings += _balance({name: counts[number] for number, name in enumerate(train.classes)}, "classify")
    return findings


class _Seen(NamedTuple):
    """What is remembered of an image to recognise it."""

    split: str
    file: str
    label: str | None
    content: bytes


class _Notes:
    """What is found out about a set, file after file."""

    def __init__(self, tree: FileTree, grey_range: GreyRange | None) -> None:
        self.tree = tree
        self.grey_range = grey_range
        self.findings: list[Finding] = []
        self.sizes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.grey: list[tuple[int, int, int, int]] = []  # see `pcenet.data.images.Inspection`
        self._seen: dict[bytes, _Seen] = {}
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
        this = _Seen(split, file, label, hashlib.sha256(data).digest())
        first = self._seen.setdefault(pixels, this)
        if first is not this:
            self.findings.append(_duplicate(first, this))
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
    layout, faults = find_layout(names, notes.tree.around)
    notes.refuse_all("names and folders", faults)
    notes.findings += [_note(fault) for fault in layout.notes]
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
    notes.findings += _little_grey(notes.grey)
    notes.findings += _balance(counts.get("train", {}), "classify")
    return _report(source, "classify", layout.classes, splits, notes, counts=counts, samples=samples)


def _check_segmentation(
    source: str,
    names: list[str],
    notes: _Notes,
    progress: Progress,
    given: Sequence[str] | str | None,
    ignore_index: IgnoreIndex,
) -> CheckReport:
    layout, faults = find_pairs(names)
    notes.refuse_all("names and folders", faults)
    notes.findings += [_note(fault) for fault in layout.notes]
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
    notes.findings += _little_grey(notes.grey)
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
    notes.findings += _much_ignored(ignored.get("train", 0), ignored.get("train", 0) + counted, classes.ignored)
    notes.findings += _few_images(len(splits.get("train", [])), classes.names)
    notes.findings += _balance(counts.get("train", {}), "segment")
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


def _duplicate(first: _Seen, this: _Seen) -> Finding:
    same = "the same file" if first.content == this.content else "another file with the same pixels"
    text = f"it shows what '{first.file}' shows ({same})"
    if first.label != this.label:
        text += f", under class '{this.label}' instead of '{first.label}'"
    if first.split == this.split:
        return Finding("warning", "duplicate", this.file, f"{text}. Remove one of them.")
    text += f", but it is in {this.split} and that in {first.split}. Remove one: what was learnt cannot test."
    return Finding("warning", "duplicate between splits", this.file, text)


def _note(fault: Fault) -> Finding:
    """What was guessed or passed over."""
    return Finding("warning", "names and folders", fault.file, fault.text)


def _much_ignored(ignored: int, pixels: int, values: Iterable[int] = ()) -> list[Finding]:
    """Whether so many of the pixels for training do not count that a class may be among them."""
    if ignored <= MANY_IGNORED * pixels:
        return []
    which = f" (mask values {listed(sorted(values))})" if values else ""
    text = (
        f"{ignored / pixels:.1%} of the training pixels do not count{which}. If one of the values that do not is a"
        f" class, change --ignore-index: with {NOTHING_IGNORED} every value counts, 255 too."
    )
    return [Finding("warning", "pixels that do not count", "", text)]


def _little_grey(found: Sequence[tuple[int, int, int, int]]) -> list[Finding]:
    """Whether deep grey images together use so little of their range that they are dark or flat."""
    if not found:
        return []
    least, most = min(grey[0] for grey in found), max(grey[1] for grey in found)
    black, white = min(grey[2] for grey in found), max(grey[3] for grey in found)
    used = (min(most, white) - max(least, black)) / (white - black)
    if used >= LITTLE_GREY or least == most:  # images of one value have nothing to lose
        return []
    text = (
        f"the {len(found)} grey images of more than 8 bits have values from {least} to {most}, {max(used, 0):.1%} of"
        f" the range {black} to {white}: they will be dark or flat. {way_out(least, most)}"
    )
    return [Finding("warning", "grey range", "", text)]


def _few_images(count: int, classes: Sequence[str]) -> list[Finding]:
    if count >= len(classes):
        return []
    text = f"there are {count} training images for {len(classes)} classes. Add images."
    return [Finding("warning", "class balance", "", text)]


def _balance(counts: Mapping[str, int], task: TaskName) -> list[Finding]:
    """What is worth knowing about the training images, or pixels, of each class."""
    what, enough = (
        ("training image", "images") if task == "classify" else ("training pixel", "images, or weigh it more")
    )
    findings = []
    for name, count in counts.items():
        if count <= 1:
            never = "" if count or task == "classify" else ": it can never be learnt"
            text = f"class '{name}' has {'a single' if count else 'no'} {what}{never}. Add {enough}."
            findings.append(Finding("warning", "class balance", name, text))
    several = {name: count for name, count in counts.items() if count > 1}
    rarest, commonest = (pick(several, key=several.__getitem__, default="") for pick in (min, max))
    if several and several[rarest] * IMBALANCE[task] < several[commonest]:
        text = (
            f"class '{commonest}' has {counts[commonest]} {what}s, class '{rarest}' {counts[rarest]}, more than"
            f" {IMBALANCE[task]} times fewer: a network may never choose it. Add {enough}."
        )
        findings.append(Finding("warning", "class balance", rarest, text))
    return findings


def _spread(items: Sequence[E | int], count: int) -> list[Any]:
    """Up to ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _reduced(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    return small
