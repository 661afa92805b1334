"""The curves of a comparison: scores over the epochs, the mean of the seeds over the single runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pcenet.reporting.colours import PALETTE
from pcenet.reporting.plots import as_label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[Mapping[str, Any]]


def curves(report: Mapping[str, Any]) -> Figure:
    """Scores on training and validation images, a colour per label.

    Raises:
        ModuleNotFoundError: without matplotlib; names what to install.
    """
    figure = new_figure(11, 4)
    panels = {"train_score": f"train {report['train_score']}", "val_score": f"val {report['score']}"}
    for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, row in enumerate(report["summary"]):
            colour = PALETTE[number % len(PALETTE)]
            runs = [run["curve"] for run in report["runs"] if run["label"] == row["label"]]
            for run in runs:
                axis.plot([point["epoch"] for point in run], values(run, name), color=colour, alpha=0.3, linewidth=0.8)
            epochs, means = mean_curve(runs, name)
            axis.plot(epochs, means, color=colour, label=as_label(f"{row['label']} ({len(runs)})"))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, title="mean over seeds", title_fontsize=8)
    return figure


def values(run: Curve, name: str) -> list[float]:
    """One figure of each epoch; NaN, which leaves a gap, where it was no number."""
    return [math.nan if point[name] is None else point[name] for point in run]


def mean_curve(runs: Sequence[Curve], name: str) -> tuple[list[int], list[float]]:
    """Epochs that all runs have, and the mean of a figure in each."""
    columns = list(zip(*(values(run, name) for run in runs), strict=False))
    epochs = [int(point["epoch"]) for point in runs[0][: len(columns)]]
    return epochs, [statistics.fmean(column) for column in columns]
