"""Sample sheets: what a data set looks like. matplotlib is imported when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from pcenet.data import IGNORE, CheckReport
from pcenet.reporting.colours import class_colours, css, palette
from pcenet.reporting.plots import as_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES, COLUMNS = 20, 4  # rows of a sheet of labelled images; columns of one of masks
OPACITY = 0.5  # of a mask over its image


def sample_sheet(report: CheckReport) -> Figure:
    """The samples of a report as a picture.

    To classify: a row per class (the first 20), named, with its number of training images. To segment: images with
    their masks laid over them, named, and a legend of the classes with their share of the training pixels.

    Raises:
        ValueError: the report has no samples.
        ModuleNotFoundError: without matplotlib; ``pip install 'pcenet[plot]'``.
    """
    if not report.samples:
        raise ValueError("report has no samples: no training image could be read")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'pcenet[plot]'") from error
    return _labelled(report) if report.task == "classify" else _masked(report)


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image with its mask laid over it in the colours of the classes; pixels that do not count stay as they are."""
    colours = mask.copy()
    colours.putpalette(palette(range(IGNORE)))
    counts = mask.point([255] * IGNORE + [0])
    return Image.composite(Image.blend(image, colours.convert("RGB"), OPACITY), image, counts)


def _labelled(report: CheckReport) -> Figure:
    from matplotlib.figure import Figure

    classes = report.classes[:MOST_CLASSES]
    rows = [[sample for sample in report.samples if sample.label == name] for name in classes]
    columns = max(map(len, rows), default=1) or 1
    figure = Figure(figsize=(1.1 * columns + 2, 1.15 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for name, samples, row in zip(classes, rows, axes, strict=True):
        for axis, sample in zip(row, samples, strict=False):
            axis.imshow(sample.image)
        row[0].set_ylabel(f"{as_label(name)}\n{report.counts['train'][name]}", rotation=0, ha="right", va="center")
    shown = f"{len(classes)} of {len(report.classes)} classes" if len(classes) < len(report.classes) else "all classes"
    return _finished(figure, f"{report.source}: {shown}, with their training images")


def _masked(report: CheckReport) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shares = report.shares
    rows = -(-len(report.samples) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 2.6 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, sample in zip(axes, report.samples, strict=False):
        assert sample.mask is not None
        axis.imshow(overlay(sample.image, sample.mask))
        axis.set_title(as_label(sample.file.rpartition("/")[2]), fontsize=8)
    legend = [
        Patch(color=css(colour), label=as_label(f"{name}: {shares[name]:.1%}"))
        for name, colour in zip(report.classes, class_colours(), strict=False)
    ]
    legend.append(Patch(facecolor="none", edgecolor="grey", label="uncoloured: does not count"))
    figure.legend(handles=legend, loc="outside lower center", ncols=6)
    return _finished(figure, f"{report.source}: training images with their masks; share of the pixels")


def _finished(figure: Figure, title: str) -> Figure:
    figure.suptitle(as_label(title))
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
