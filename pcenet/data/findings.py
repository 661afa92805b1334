"""What can be said of a data set: its report, and the findings in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from PIL import Image

from pcenet.choices import NOTHING_IGNORED, TaskName
from pcenet.data.base import Fault
from pcenet.data.grey import way_out
from pcenet.data.masks import listed

Severity = Literal["error", "warning"]

IMBALANCE: dict[TaskName, int] = {"classify": 10, "segment": 100}  # so many times rarer is worth a warning
MANY_IGNORED = 0.2  # of the pixels of the masks; more that do not count are worth a warning
LITTLE_GREY = 0.5  # of the range of deep grey images; a set that uses less is worth a warning


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


class SeenImage(NamedTuple):
    """What is remembered of an image to recognise it."""

    split: str
    file: str
    label: str | None
    content: bytes


def duplicate(first: SeenImage, this: SeenImage) -> Finding:
    """Two images that are the same, and what that spoils."""
    same = "the same file" if first.content == this.content else "another file with the same pixels"
    text = f"it shows what '{first.file}' shows ({same})"
    if first.label != this.label:
        text += f", under class '{this.label}' instead of '{first.label}'"
    if first.split == this.split:
        return Finding("warning", "duplicate", this.file, f"{text}. Remove one of them.")
    text += f", but it is in {this.split} and that in {first.split}. Remove one: what was learnt cannot test."
    return Finding("warning", "duplicate between splits", this.file, text)


def passed_over(fault: Fault) -> Finding:
    """What was guessed or passed over."""
    return Finding("warning", "names and folders", fault.file, fault.text)


def much_ignored(ignored: int, pixels: int, values: Iterable[int] = ()) -> list[Finding]:
    """Whether so many of the pixels for training do not count that a class may be among them."""
    if ignored <= MANY_IGNORED * pixels:
        return []
    which = f" (mask values {listed(sorted(values))})" if values else ""
    text = (
        f"{ignored / pixels:.1%} of the training pixels do not count{which}. If one of the values that do not is a"
        f" class, change --ignore-index: with {NOTHING_IGNORED} every value counts, 255 too."
    )
    return [Finding("warning", "pixels that do not count", "", text)]


def little_grey(found: Sequence[tuple[int, int, int, int]]) -> list[Finding]:
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


def few_images(count: int, classes: Sequence[str]) -> list[Finding]:
    """Whether there are fewer training images than classes."""
    if count >= len(classes):
        return []
    text = f"there are {count} training images for {len(classes)} classes. Add images."
    return [Finding("warning", "class balance", "", text)]


def imbalance(counts: Mapping[str, int], task: TaskName) -> list[Finding]:
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
