"""Predictions in memory: what ``model.predict(...)`` returns for files, folders, pictures, arrays and tensors."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pcenet.choices import GreyRange, Precision
from pcenet.data.images import picture_of
from pcenet.inference.batches import read_batches
from pcenet.inference.inputs import InputFile, LeftOut, find_inputs
from pcenet.inference.network import Grids, Network
from pcenet.inference.segment import masks_of
from pcenet.inference.windows import SlidingWindow, image_transform
from pcenet.models import SavableModel
from pcenet.reporting.colours import palette
from pcenet.reporting.numbers import percent
from pcenet.runtime.device import resolve_precision, set_precision
from pcenet.tasks.evaluation import eval_batch_size
from pcenet.texts import valid
from pcenet.writing import write_text

SHOWN = 10  # predictions that a ``repr`` lists
PLOTTED = 12  # pictures that `Predictions.plot` draws
Experts = Mapping[str, list[list[int]]]


@dataclass(frozen=True)
class GivenImage:
    """A picture that was given itself, with what to call it; stands where an `InputFile` may."""

    file: str
    picture: Image.Image

    def image(self) -> Image.Image:
        """The picture."""
        return self.picture


@dataclass(frozen=True)
class Prediction:
    """The label of an image.

    Attributes:
        file: its path, or "image 0" and so on for one that was given itself.
        label: the most probable class.
        probability: its probability.
        top: (class, probability), the most probable first.
        experts: by layer the expert of each patch, as rows of columns; -1: dropped. Empty for a dense network.
    """

    file: str
    label: str
    probability: float
    top: Sequence[tuple[str, float]] = field(repr=False)
    experts: Experts = field(default_factory=dict, repr=False)
    source: GivenImage | InputFile | None = field(default=None, repr=False)

    @property
    def row(self) -> dict[str, str | float]:
        """What `Predictions.to_csv` writes."""
        return {"file": self.file, "label": self.label, "probability": self.probability}

    def picture(self) -> Image.Image:
        """The image."""
        assert self.source is not None
        return self.source.image()

    def __str__(self) -> str:
        return f"{self.file}: {self.label} {percent(self.probability)}"


@dataclass(frozen=True)
class Segmentation:
    """The class of each pixel of an image.

    Attributes:
        file: its path, or "image 0" and so on for one that was given itself.
        mask: ``[H, W]`` uint8, class numbers, at the image's size.
        classes: class names, by number.
        experts: by layer the expert of each patch, as rows of columns; -1: dropped. Empty for a dense network, and for
            an image that was predicted in windows, which overlap.
    """

    file: str
    mask: npt.NDArray[np.uint8] = field(repr=False)
    classes: Sequence[str]
    experts: Experts = field(default_factory=dict, repr=False)
    source: GivenImage | InputFile | None = field(default=None, repr=False)

    @property
    def shares(self) -> dict[str, float]:
        """By class the share of the pixels that it has."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.classes))
        return {name: float(count) / self.mask.size for name, count in zip(self.classes, counts, strict=True)}

    @property
    def row(self) -> dict[str, str | float]:
        """What `Predictions.to_csv` writes."""
        return {"file": self.file, **{f"share_{name}": share for name, share in self.shares.items()}}

    def picture(self, opacity: float = 0.5) -> Image.Image:
        """The image under the classes' colours.

        Args:
            opacity: of the colours, from 0 (the image alone) to 1.
        """
        assert self.source is not None
        colours = Image.fromarray(self.mask)
        colours.putpalette(palette(range(len(self.classes))))
        return Image.blend(self.source.image(), colours.convert("RGB"), opacity)

    def __str__(self) -> str:
        largest = sorted(self.shares.items(), key=lambda item: -item[1])[:3]
        return f"{self.file}: {', '.join(f'{name} {percent(share)}' for name, share in largest if share)}"


class Predictions(Sequence[Prediction | Segmentation]):
    """Predictions in the order of the images; a list that can write and draw itself.

    Attributes:
        left_out: files that could not be read, with the reason.
    """

    def __init__(self, items: Sequence[Prediction | Segmentation], left_out: Sequence[LeftOut] = ()) -> None:
        self._items = list(items)
        self.left_out = list(left_out)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Prediction | Segmentation: ...

    @overload
    def __getitem__(self, index: slice) -> Predictions: ...

    def __getitem__(self, index: int | slice) -> Prediction | Segmentation | Predictions:
        return Predictions(self._items[index]) if isinstance(index, slice) else self._items[index]

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each: file, label and probability, or the share of each class.

        Raises:
            OSError: if the file cannot be written.
        """
        rows = [item.row for item in self._items]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["file"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: valid(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows)
        write_text(Path(path), text.getvalue())

    def plot(self, columns: int = 4) -> Any:
        """A matplotlib figure of the first pictures with their labels, or under their classes' colours.

        A notebook shows figures once ``matplotlib.pyplot`` has been imported in it.

        Raises:
            ModuleNotFoundError: without matplotlib; ``pip install 'pcenet[plot]'``.
        """
        from pcenet.reporting.plots import new_figure

        shown = self._items[:PLOTTED]
        columns = max(1, min(columns, len(shown)))
        rows = -(-len(shown) // columns)
        figure = new_figure(3.0 * columns, 3.2 * max(rows, 1))
        for number, item in enumerate(shown, 1):
            panel = figure.add_subplot(rows, columns, number)
            panel.imshow(np.asarray(item.picture()))
            panel.set_title(valid(str(item)), fontsize=8, wrap=True)
            panel.axis("off")
        return figure

    def __repr__(self) -> str:
        lines = [str(item) for item in self._items[:SHOWN]]
        lines += [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        lines += [f"left out: {file.file}: {file.reason}" for file in self.left_out[:SHOWN]]
        return "\n".join([f"{len(self)} prediction{'s' * (len(self) != 1)}", *(f"  {line}" for line in lines)])


@torch.inference_mode()
def predict_images(
    model: SavableModel,
    inputs: Any,
    *,
    top: int = 5,
    tta: bool = False,
    sliding_window: bool = False,
    overlap: float = 0.25,
    batch_size: int | None = None,
    precision: Precision | None = None,
) -> Predictions:
    """Apply a network, where it is, to images; arguments and errors as in `SavableModel.predict`."""
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
    for name, value in (("tta", tta), ("sliding_window", sliding_window)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap < 1:
        raise ValueError(f"overlap must be a number from 0 on and below 1, got {overlap!r}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision {precision!r} is not one of {', '.join(get_args(Precision))}")
    if model.num_classes < 1:
        raise ValueError("the network has no classifier (num_classes is 0), so there is no class to predict")
    files, left_out = given_images(inputs, model)
    device = next(model.parameters()).device
    classes = list(model.class_names or map(str, range(model.num_classes)))
    network = Network(model, classes, True, device, resolve_precision(precision or "auto", device), tta)
    batch_size = batch_size or eval_batch_size(model)
    windows = SlidingWindow(network, overlap, batch_size) if sliding_window else None
    batches = read_batches(files, image_transform(model, windows), batch_size=batch_size, workers=0)
    set_precision(network.precision, device)
    modes = [(module, module.training) for module in model.modules()]
    items: list[Prediction | Segmentation] = []
    model.eval()
    try:
        for batch in batches:
            left_out += batch.left_out
            if not batch.files:
                continue
            if model.task == "classify":
                found = zip(batch.files, *network(batch.images), strict=True)
                items += [label_of(file, scores, classes, grids, top) for file, scores, grids in found]
            else:
                masks = masks_of(batch, network, windows)
                items += [
                    Segmentation(
                        mask.file.file, mask.classes.numpy(), classes, mask.grids.get("routing", {}), mask.file
                    )
                    for mask in masks
                ]
    finally:
        for module, training in modes:
            module.training = training
    return Predictions(items, left_out)


def label_of(file: Any, logits: Tensor, classes: Sequence[str], grids: Grids, top: int) -> Prediction:
    """What the logits of one image say."""
    best = logits.softmax(0).topk(min(top, len(classes)))
    ranked = [(classes[number], value) for number, value in zip(best.indices, best.values.tolist(), strict=True)]
    return Prediction(file.file, *ranked[0], ranked, grids["routing"], file)


def given_images(inputs: Any, model: SavableModel) -> tuple[list[Any], list[LeftOut]]:
    """The images that an argument of ``predict`` means, in order, and the files among them that are left out."""
    files: list[Any] = []
    left_out: list[LeftOut] = []
    for given in inputs if isinstance(inputs, list | tuple) else [inputs]:
        if isinstance(given, str | os.PathLike):
            found, lost = find_inputs([os.fspath(given)], model.grey_range)
            files += found
            left_out += lost
        else:
            first = len(files)
            given_ones = pictures(given, f"image {first}", model.grey_range)
            files += [GivenImage(f"image {first + number}", each) for number, each in enumerate(given_ones)]
    return files, left_out


def pictures(given: Any, name: str, grey_range: GreyRange | None = None) -> Iterator[Image.Image]:
    """The pictures in a PIL image, an array ``[H, W]`` or ``[H, W, 3]``, a tensor ``[3, H, W]``, or a batch of these.

    Raises:
        DataError: for a PIL image that would be refused in a file, too.
        TypeError: for anything else.
        ValueError: for other shapes, or numbers that are no colours.
    """
    if isinstance(given, Image.Image):
        yield picture_of(given, name, grey_range=grey_range)
        return
    if isinstance(given, Tensor):
        values = given.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which NumPy does not know
        if values.ndim not in (3, 4) or values.shape[-3] not in (1, 3):
            raise ValueError(f"inputs: a tensor must be [3, H, W] or [B, 3, H, W], not {list(values.shape)}")
        array = values.movedim(-3, -1).numpy()
    elif isinstance(given, np.ndarray):
        array = given[..., None] if given.ndim == 2 else given
        if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3):
            raise ValueError(f"inputs: an array must be [H, W], [H, W, 3] or [B, H, W, 3], not {list(given.shape)}")
    else:
        kinds = "paths, PIL images, arrays, tensors, or a list of them"
        raise TypeError(f"inputs must be {kinds}, not {type(given).__name__}")
    if 0 in array.shape[-3:-1]:
        raise ValueError(f"inputs: an image must have pixels, not the shape {list(given.shape)}")
    for image in array if array.ndim == 4 else [array]:
        yield Image.fromarray(np.broadcast_to(in_bytes(image), (*image.shape[:2], 3)).copy())


def in_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Colours from 0 to 255; those of floating point are given from 0 to 1."""
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"inputs: numbers of an image must be uint8 (0 to 255) or float (0 to 1), not {values.dtype}")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"inputs: a float image must lie from 0 to 1, as images do before they are normalised, not from"
            f" {values.min():.3g} to {values.max():.3g}"
        )
    return np.rint(values * 255).astype(np.uint8)
