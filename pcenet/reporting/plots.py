"""Pictures of a run, drawn from its figures. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcenet.reporting.colours import PALETTE, css, expert_colours
from pcenet.runs.health import EVALUATED, TRAINED
from pcenet.runtime.memory import reason_of
from pcenet.texts import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED = 40  # classes up to which the confusion matrix names them
NUMBERED = 15  # and writes its shares down
NAMED = 16  # experts up to which a legend names them; one of more would leave no room for the load
RESOLUTION = 110  # pixels per inch

Row = Mapping[str, float]

log = logging.getLogger(__name__)


@contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Draw what a complete result can do without: whatever goes wrong is a warning, and does not make it look failed.

    Args:
        path: of the file or folder of pictures, to be named.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s; %s was not drawn", reason_of(error), path)


def pictures_of(
    rows: Sequence[Row], matrix: Sequence[Sequence[int]], classes: Sequence[str], scores: Sequence[str]
) -> dict[str, Figure]:
    """All pictures of a run by name: ``curves``, ``confusion`` and, of a network with PCE layers, ``expert_load``."""
    pictures = {"curves": curves(rows, scores), "confusion": confusion(matrix, classes)}
    if layers_of(rows):
        pictures["expert_load"] = expert_load(rows)
    return pictures


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ModuleNotFoundError: without matplotlib; names what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'pcenet[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Figure, resolution: int = RESOLUTION, **options: Any) -> bytes:
    """A figure as PNG.

    Args:
        figure: matplotlib's.
        resolution: pixels per inch.
        options: others of ``savefig``.
    """
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Names may be in a script that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png", dpi=resolution, **options)
    return stream.getvalue()


def as_label(name: str) -> str:
    """A name as matplotlib draws it: `shown`, no formula, and in legends, too, which leave out what begins with "_"."""
    text = shown(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def curves(rows: Sequence[Row], scores: Sequence[str]) -> Figure:
    """Losses, scores and learning rate over the epochs.

    Args:
        rows: the figures of each epoch, as in ``metrics.csv``.
        scores: which of them are scores, between 0 and 1.
    """
    figure = new_figure(12, 3.4)
    panels = {
        "loss": ("train/loss", "train/task_loss", "val/loss"),
        "score": tuple(scores),
        "learning rate": ("train/lr",),
    }
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for colour, name in enumerate(names):
            plot(axis, rows, name, colour)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    return figure


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """The confusion matrix, each row as shares of its class.

    Args:
        matrix: ``matrix[i][j]`` of class i were predicted as class j.
        classes: their names.
    """
    count, names = len(classes), [as_label(name) for name in classes]
    figure = new_figure(3 + 0.35 * min(count, LABELLED), 2.4 + 0.35 * min(count, LABELLED))
    axis = figure.subplots()
    shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the class", shrink=0.8)
    axis.set(xlabel="predicted", ylabel="class")
    if count <= LABELLED:
        axis.set_xticks(range(count), names, rotation=90, fontsize=8)
        axis.set_yticks(range(count), names, fontsize=8)
    if count <= NUMBERED:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                colour = "white" if share > 0.5 else "black"
                axis.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def expert_load(rows: Sequence[Row]) -> Figure:
    """For each PCE layer the load of its experts on ``val`` over the epochs, and the share of the choices that were
    dropped in training.

    Args:
        rows: the figures of each epoch, as in ``metrics.csv``.

    Raises:
        ValueError: for figures without such loads, as of a dense network.
    """
    layers = layers_of(rows)
    if not layers:
        raise ValueError("rows are of a network without PCE layers: there is no load to draw")
    figure = new_figure(9, 2.1 * len(layers))
    for (load, dropped), layer in zip(figure.subplots(len(layers), 2, squeeze=False), layers, strict=True):
        draw_load(load, rows, layer)
        load.set(ylabel=layer.removesuffix(".body"), title="load on val")
        plot(dropped, rows, f"{TRAINED}/{layer}/drop_rate", 0)
        dropped.set(ylim=(0, None), title="dropped in training")
        for axis in (load, dropped):
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_load(axis: Any, rows: Sequence[Row], layer: str) -> None:
    """The load of a layer's experts on ``val`` over the epochs that know it, as bars that add up to 1.

    Args:
        axis: matplotlib's, to draw on.
        rows: the figures of each epoch, as in ``metrics.csv``.
        layer: name of the layer.
    """
    rows = [row for row in rows if f"{EVALUATED}/{layer}/load_0" in row]
    epochs = [row["epoch"] for row in rows]
    below = [0.0] * len(rows)
    for expert, name in enumerate(name for name in rows[-1] if name.startswith(f"{EVALUATED}/{layer}/load_")):
        shares = [row[name] for row in rows]
        axis.bar(
            epochs,
            shares,
            bottom=below,
            width=1,
            color=css(expert_colours()[expert % len(expert_colours())]),
            label=str(expert),
        )
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axis.set_ylim(0, 1)
    if len(axis.containers) <= NAMED:
        axis.legend(title="expert", fontsize=7, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def layers_of(rows: Sequence[Row]) -> list[str]:
    """Names of the PCE layers whose loads on ``val`` the figures tell."""
    return [match[1] for name in rows[-1] if (match := re.fullmatch(rf"{EVALUATED}/(.*)/load_0", name))]


def plot(axis: Any, rows: Sequence[Row], name: str, colour: int) -> None:
    """One figure over the epochs that have it; with dots, so that a single epoch shows."""
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    axis.plot(*zip(*points, strict=True), marker=".", color=PALETTE[colour % len(PALETTE)], label=name)
