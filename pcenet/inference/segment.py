"""A class for each pixel: masks, overlays and shares."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcenet.inference.batches import Batch
from pcenet.inference.network import Grids, Network
from pcenet.inference.outputs import OutputNames, Row
from pcenet.inference.windows import SlidingWindow
from pcenet.reporting.colours import palette
from pcenet.reporting.numbers import percent
from pcenet.tasks.pixels import classes_at

MASKS, OVERLAYS = "masks", "overlays"
PICTURES = MASK, OVERLAY = ".png", ".jpg"  # how their files end
MOST_SHOWN = 3  # classes in a row of the table on the terminal


@dataclass(frozen=True)
class Segmenter:
    """Segments images; writes a mask and an overlay for each.

    Attributes:
        network: gives logits ``[B, len(network.classes), H, W]``.
        folder: where to.
        opacity: of the colours in the overlay, from 0 to 1.
        values: the value of each class in the masks.
        windows: what predicts large images; None: they are made smaller, too.
    """

    network: Network
    folder: Path
    opacity: float
    values: Sequence[int]
    windows: SlidingWindow | None = None
    names: OutputNames = field(default_factory=lambda: OutputNames(PICTURES))

    headings = ("file", "largest shares")

    @property
    def columns(self) -> list[str]:
        """``file, mask, overlay``, then the share of each class."""
        return ["file", MASKS.removesuffix("s"), OVERLAYS.removesuffix("s"), *self._share_names]

    @property
    def _share_names(self) -> list[str]:
        return [f"share_{name}" for name in self.network.classes]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Row]:
        """A row per file of the batch; the files are written when it returns."""
        return [self._row(each) for each in masks_of(batch, self.network, self.windows)]

    def _row(self, found: Mask) -> Row:
        file, image, numbers = found.file, found.image, found.classes
        name = self.names.take(file)
        mask, overlay = f"{MASKS}/{name}{MASK}", f"{OVERLAYS}/{name}{OVERLAY}"
        picture = Image.fromarray(numbers.numpy())
        picture.putpalette(palette(range(len(self.network.classes))))
        write_picture(self._mask(numbers), self.folder / mask)
        write_picture(Image.blend(image, picture.convert("RGB"), self.opacity), self.folder / overlay)
        counts = picture.histogram()[: len(self.network.classes)]
        shares = [count / numbers.numel() for count in counts]
        record = {
            "file": file.file,
            "mask": mask,
            "overlay": overlay,
            "shares": dict(zip(self.network.classes, shares, strict=True)),
        }
        shown = [file.file, largest(self.network.classes, shares)]
        return Row([file.file, mask, overlay, *shares], record | found.grids, shown)

    def _mask(self, numbers: Tensor) -> Image.Image:
        """Class numbers as a mask in the classes' values: with their colours, or grey where values have 16 bits."""
        of_class = np.array(self.values, np.uint8 if max(self.values) < 256 else np.uint16)
        picture = Image.fromarray(of_class[numbers.numpy()])
        if of_class.dtype == np.uint8:
            picture.putpalette(palette(self.values))
        return picture


@dataclass(frozen=True)
class Mask:
    """The class of each pixel of a file's image.

    Attributes:
        file: the `InputFile`, or what stands in its place.
        image: its image.
        classes: ``[H, W]`` uint8, at the image's size, on the processor.
        grids: see `Network`; nothing for what was predicted in windows, which overlap.
    """

    file: Any
    image: Image.Image
    classes: Tensor
    grids: Grids


def masks_of(batch: Batch, network: Network, windows: SlidingWindow | None) -> Iterator[Mask]:
    """The masks of a batch, one after the other, since images and masks of all files could take gigabytes."""
    if windows is not None and not batch.images.numel():
        for file in batch.files:
            image = file.image()
            yield Mask(file, image, windows(image), {})
        return
    for file, logits, grids in zip(batch.files, *network(batch.images), strict=True):
        image = file.image()
        yield Mask(file, image, classes_at(logits, (image.height, image.width)).cpu(), grids)


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write an image file, and the folders that it needs.

    It is encoded in memory: of a full disk Pillow's encoders do not say what happened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, Image.registered_extensions()[path.suffix])
    path.write_bytes(content.getvalue())


def largest(classes: Sequence[str], shares: Sequence[float]) -> str:
    """The classes with the largest shares, in words."""
    ranked = sorted(zip(shares, classes, strict=True), key=lambda pair: -pair[0])[:MOST_SHOWN]
    return ", ".join(f"{name} {percent(share)}" for share, name in ranked if share)
