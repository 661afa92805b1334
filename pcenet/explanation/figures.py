"""The figures of a report, each with its alternative text. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pcenet.explanation.findings import points, row_label
from pcenet.explanation.report import Report
from pcenet.reporting.colours import PALETTE, css, expert_colours
from pcenet.reporting.numbers import share_text
from pcenet.reporting.plots import Row, as_label, draw_load, new_figure, png_of
from pcenet.runs.health import EVALUATED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: read at full width on a phone, beside others on a desk
RESOLUTION = 150  # pixels per inch
MOST_CLASSES = 30  # rows of a heat map
LONGEST_NAME = 22  # characters
FEW = 8  # experts whose maps have room for values
WRITTEN = 100  # cells of a map up to which their values are written into them

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Picture:
    """A figure, ready to be written.

    Attributes:
        name: of its file, without suffix.
        alt: what it shows, in words.
        png: the file's bytes.
        size: width and height in pixels.
    """

    name: str
    alt: str
    png: bytes
    size: tuple[int, int]


def from_image(name: str, alt: str, image: Image.Image) -> Picture:
    """A picture of at most 256 colours, which makes a photograph's file a third as large."""
    stream = BytesIO()
    image.convert("RGB").quantize(256).save(stream, "PNG", optimize=True)
    return Picture(name, alt, stream.getvalue(), image.size)


def from_figure(name: str, alt: str, figure: Figure) -> Picture:
    """A drawn figure."""
    png = png_of(figure, RESOLUTION, metadata={"Software": None})
    with Image.open(BytesIO(png)) as image:
        return Picture(name, alt, png, image.size)


def slug(title: str) -> str:
    """A layer's title as part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in title)


def class_map(layer: Report) -> Picture | None:
    """Which share of each class goes to each expert; None where no patch has a class."""
    counts = layer["by_class"]
    if not counts:
        return None
    rows = np.array(list(counts.values()), float)
    loads = rows.sum(0) / rows.sum()
    totals = rows.sum(1)
    shares = np.divide(rows, totals[:, None], out=np.zeros_like(rows), where=totals[:, None] > 0)
    # The classes that differ most from all patches, where there are too many to show; in the order of the data.
    unlike = np.where(totals > 0, np.abs(shares - loads).max(1), -1)
    shown = np.sort(np.argsort(-unlike, kind="stable")[: min(MOST_CLASSES, int((totals > 0).sum()))])
    names = [list(counts)[i] for i in shown]
    values = np.vstack((shares[shown], loads))
    labels = [f"{short(name)} ({int(totals[i])})" for name, i in zip(names, shown, strict=True)]
    figure = _heat_map(values, [*labels, "all patches"], layer["experts"], "Blues", (0, 1), lambda v: f"{100 * v:.0f}")
    axis = figure.axes[0]
    axis.axhline(len(names) - 0.5, color="black", linewidth=1.5)
    axis.set_title("% of a class's patches, by expert", fontsize=9)
    best = [
        f"{name}: expert {int(row.argmax())} {share_text(row.max())}"
        for name, row in zip(names, shares[shown], strict=True)
    ]
    alt = f"Heat map of {layer['title']}, classes by experts. " + "; ".join(best) + "."
    return from_figure(f"{slug(layer['title'])}-classes", alt, figure)


def place_maps(layer: Report) -> Picture:
    """Which share of the patches at each place goes to each expert, a map per expert."""
    rows, columns = layer["grid"]
    counts = np.array(layer["by_place"], float)
    shares = (counts / np.maximum(counts.sum(0), 1)).reshape(-1, rows, columns)
    few = len(shares) <= FEW
    across = min(2 if few else 4, len(shares))
    down = -(-len(shares) // across)
    written = few and rows * columns <= WRITTEN
    figure = new_figure(WIDTH, down * (WIDTH / across * rows / columns + 0.25) + (0 if written else 0.6))
    axes = figure.subplots(down, across, squeeze=False).ravel()
    image: Any = None
    for expert, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if expert >= len(shares):
            axis.axis("off")
            continue
        image = axis.imshow(shares[expert], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"expert {expert}", fontsize=9)
        if written:
            _write_values(axis, shares[expert], lambda value: f"{100 * value:.0f}", lambda value: value > 0.5)
    if not written:
        figure.colorbar(image, ax=list(axes), location="bottom", shrink=0.8, label="share of the place's patches")
    alt = f"Maps of {layer['title']}: the share of each place's patches that an expert serves. " + " ".join(
        f"Expert {expert}: from {share_text(share.min())} to {share_text(share.max())}, most {place_in_words(share)}."
        for expert, share in enumerate(shares)
    )
    return from_figure(f"{slug(layer['title'])}-places", alt, figure)


def typical_place(layer: Report, expert: int) -> Picture:
    """Where an expert's patches lie: a small map in its colour, the most frequent place darkest."""
    rows, columns = layer["grid"]
    counts = np.array(layer["by_place"][expert], float).reshape(rows, columns)
    weight = (counts / max(counts.max(), 1))[..., None]
    cells = (255 * (1 - weight) + np.array(expert_colours()[expert]) * weight).round().astype(np.uint8)
    scale = max(1, 120 // max(rows, columns))
    map_ = np.kron(cells, np.ones((scale, scale, 1), np.uint8))
    framed = np.pad(map_, ((2, 2), (2, 2), (0, 0)), constant_values=90)
    where = f"mostly {place_in_words(counts)}" if counts.any() else "nowhere"
    alt = f"Where the patches of expert {expert} of {layer['title']} lie: {where}."
    return from_image(f"{slug(layer['title'])}-expert-{expert}-place", alt, Image.fromarray(framed))


def place_in_words(weights: Any) -> str:
    """Where the weight of a map ``[rows, columns]`` lies, such as "at the upper left"; "all over" where it is even."""
    weights = np.asarray(weights, float)
    total = weights.sum()
    if not total:
        return "nowhere"
    rows, columns = weights.shape
    down = float(((np.arange(rows) + 0.5) / rows * weights.sum(1)).sum() / total)
    right = float(((np.arange(columns) + 0.5) / columns * weights.sum(0)).sum() / total)
    vertical = "upper" if down < 0.42 else "lower" if down > 0.58 else ""
    horizontal = "left" if right < 0.42 else "right" if right > 0.58 else ""
    if vertical and horizontal:
        return f"at the {vertical} {horizontal}"
    if vertical:
        return "at the top" if vertical == "upper" else "at the bottom"
    if horizontal:
        return f"at the {horizontal}"
    centre = weights[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
    return "in the middle" if centre.mean() > 1.5 * weights.mean() else "all over"


def load_now(layer: Report) -> Picture:
    """The load of the experts on the images of the report."""
    loads = layer["health"]["load"]
    figure = new_figure(WIDTH, 0.6 + 0.28 * len(loads))
    axis = figure.subplots()
    widths = [100 * load for load in loads]
    axis.barh(range(len(loads)), widths, color=_colours(len(loads)), edgecolor="black", linewidth=0.5)
    axis.axvline(100 / len(loads), color="black", linestyle="--", linewidth=1)
    for expert, load in enumerate(loads):
        axis.annotate(
            f"{100 * load:.1f}",
            (100 * load, expert),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.set(xlabel="% of the patches; dashed: even", xlim=(0, 118 * max(loads)))
    axis.set_yticks(range(len(loads)), [f"expert {expert}" for expert in range(len(loads))], fontsize=8)
    axis.invert_yaxis()
    alt = f"Load of the experts of {layer['title']}: " + ", ".join(
        f"expert {expert} {share_text(load)}" for expert, load in enumerate(loads)
    )
    return from_figure(f"{slug(layer['title'])}-load", alt + ".", figure)


def load_history(layer: Report, rows: Sequence[Row]) -> Picture:
    """The load of the experts on the validation images over the epochs of training.

    Args:
        layer: of the report.
        rows: the figures of each epoch, as in ``metrics.csv``.
    """
    figure = new_figure(WIDTH, 2.2)
    axis: Any = figure.subplots()
    draw_load(axis, rows, layer["name"])
    axis.set(xlabel="epoch", ylabel="share of the patches")
    axis.xaxis.get_major_locator().set_params(integer=True)
    last = [value for name, value in rows[-1].items() if name.startswith(f"{EVALUATED}/{layer['name']}/load_")]
    alt = f"Load on val of the experts of {layer['title']} over {len(rows)} epochs; in the last one " + ", ".join(
        f"expert {expert} {share_text(share)}" for expert, share in enumerate(last)
    )
    return from_figure(f"{slug(layer['title'])}-load-by-epoch", alt + ".", figure)


def specialisation_figure(layers: Sequence[Report]) -> Picture | None:
    """Mutual information of each layer beside its control; None where no patch has a class."""
    layers = [layer for layer in layers if layer["specialisation"] is not None]
    if not layers:
        return None
    measures = (
        ("class", "with_class", "control_class"),
        ("position", "with_position", "control_position"),
        ("class, at one place", "with_class_given_position", "control_class_given_position"),
    )
    figure = new_figure(WIDTH, 0.9 + 0.62 * len(layers))
    axis = figure.subplots()
    for number, (label, measure, control) in enumerate(measures):
        height = [row + 0.24 * (number - 1) for row in range(len(layers))]
        values = [layer["specialisation"][measure] for layer in layers]
        axis.barh(height, values, height=0.22, color=PALETTE[number], label=label)
        chance = [layer["specialisation"][control] for layer in layers]
        axis.plot(chance, height, linestyle="", marker="|", markersize=9, markeredgewidth=2, color="black")
    axis.plot([], [], linestyle="", marker="|", markersize=9, markeredgewidth=2, color="black", label="by chance")
    axis.set_yticks(range(len(layers)), [layer["title"] for layer in layers], fontsize=8)
    axis.set(xlabel="normalised mutual information with the expert", xlim=(0, None))
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    alt = "Mutual information of expert with class, with position, and with class at one place. " + " ".join(
        f"{layer['title']}: "
        + ", ".join(
            f"{label} {layer['specialisation'][measure]:.3f} (by chance {layer['specialisation'][control]:.3f})"
            for label, measure, control in measures
        )
        + "."
        for layer in layers
    )
    return from_figure("specialisation", alt, figure)


def interventions_figure(report: Report) -> Picture:
    """What each intervention costs, with its interval."""
    rows = report["interventions"]["rows"]
    titles = {layer["name"]: layer["title"] for layer in report["layers"]}
    labels = [row_label(row) + (f", {titles[row['layer']]}" if row["layer"] is not None else "") for row in rows]
    figure = new_figure(WIDTH, 0.7 + 0.21 * len(rows))
    axis = figure.subplots()
    for place, row in enumerate(rows):
        colour = PALETTE[0] if row["layer"] is None else PALETTE[1]
        axis.barh(place, 100 * row["difference"], color=colour, height=0.7)
        axis.plot([100 * row["low"], 100 * row["high"]], [place, place], color="black", linewidth=1)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_ylim(-0.8, len(rows) - 0.2)
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(f"points of {report['score']['name']}", fontsize=8)
    axis.invert_yaxis()
    alt = "Change of the score under each intervention, in points: " + "; ".join(
        f"{label} {points(row['difference'], report['interventions']['images'])}"
        for label, row in zip(labels, rows, strict=True)
    )
    return from_figure("interventions", alt + ".", figure)


def knock_out_map(layer: Report, report: Report) -> Picture | None:
    """What each class loses without each expert; None without such interventions."""
    rows = [
        row for row in report["interventions"]["rows"] if row["layer"] == layer["name"] and row["name"] == "knocked out"
    ]
    if not rows:
        return None
    images = report["interventions"]["images"]
    classes = [name for name in report["classes"] if all(row["by_class"][name] is not None for row in rows)]
    values = np.array([[100 * row["by_class"][name] for row in rows] for name in classes])
    shown = np.sort(np.argsort(-np.abs(values).max(1, initial=0), kind="stable")[:MOST_CLASSES])
    mean = [[100 * row["difference"] for row in rows]]
    bound = max(1.0, float(np.abs(values).max(initial=0)))
    labels = [short(classes[i]) for i in shown]
    figure = _heat_map(
        np.vstack((values[shown], mean)),
        [*labels, report["score"]["name"]],
        len(rows),
        "PuOr",
        (-bound, bound),
        lambda v: points(v / 100, images),
    )
    axis = figure.axes[0]
    axis.axhline(len(labels) - 0.5, color="black", linewidth=1.5)
    axis.set_xlabel("expert knocked out")
    axis.set_title("change in points", fontsize=9)
    worst = [f"expert {row['expert']} {points(row['difference'], images)}" for row in rows]
    alt = f"Heat map of {layer['title']}: change of each class's score without each expert. In all: {', '.join(worst)}."
    return from_figure(f"{slug(layer['title'])}-knocked-out", alt, figure)


def short(name: str) -> str:
    """A class's name for a figure, not too long."""
    return as_label(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "...")


def _colours(experts: int) -> list[str]:
    """The experts' colours, as matplotlib has them."""
    return [css(colour) for colour in expert_colours()[:experts]]


def _heat_map(
    values: Any, labels: Sequence[str], experts: int, cmap: str, limits: tuple[float, float], text: Any
) -> Figure:
    figure = new_figure(WIDTH, 0.9 + 0.24 * len(labels))
    axis = figure.subplots()
    axis.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    axis.set_xticks(range(experts), [str(expert) for expert in range(experts)], fontsize=9)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlabel("expert")
    middle, half = (limits[0] + limits[1]) / 2, (limits[1] - limits[0]) / 2
    dark = (lambda v: v > middle) if limits[0] == 0 else (lambda v: abs(v - middle) > 0.6 * half)
    if experts <= FEW:
        _write_values(axis, values, text, dark)
    return figure


def _write_values(axis: Any, values: Any, text: Any, dark: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if dark(value) else "black"
        axis.text(column, row, text(value), ha="center", va="center", fontsize=7, color=colour)
