"""What a benchmark found: the table of targets, and the picture of how cost grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pcenet.benchmark.config import parse_shape
from pcenet.benchmark.targets import Record, in_digits
from pcenet.writing import filling


def verdict_table(verdicts: Sequence[Record]) -> Table:
    """The table of targets as measured."""
    table = Table("what", "cases", "mean", "worst", "must", "goal", "holds", title="time (or memory) by the base's")
    for verdict in verdicts:
        table.add_row(
            verdict["line"],
            str(verdict["cases"]),
            *(in_digits(verdict[key], verdict["figure"]) for key in ("mean", "worst", "must", "goal")),
            "yes" if verdict["holds"] else "no",
        )
    return table


def plot(records: Sequence[Record], path: str) -> None:
    """Draw the scaling suite: ratio to the dense block against the number of experts and the side of the map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    series: Iterator[tuple[Any, str, str, Callable[[Record], int]]] = iter(
        (
            (panels[0], "scaling by experts", "experts", lambda record: record["experts"]),
            (panels[1], "scaling by side", "side of the map, pixels", lambda record: parse_shape(record["name"]).side),
        )
    )
    for panel, line, label, place in series:
        chosen = [record for record in records if record["line"] == line]
        x = [place(record) for record in chosen]
        panel.plot(x, [record["ratio"] for record in chosen], marker="o", label="PCE layer")
        panel.fill_between(
            x, [record["ratio_low"] for record in chosen], [record["ratio_high"] for record in chosen], alpha=0.25
        )
        panel.axhline(1, color="black", linewidth=1, label="dense block")
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, map(str, x))
        panel.set_xlabel(label)
        top = max((record["ratio_high"] for record in records), default=1.0)
        panel.set_ylim(0, math.ceil(2 * top) / 2)
    panels[0].set_ylabel("time of a training step")
    panels[0].legend(loc="lower right")
    with filling(Path(path).parent) as folder:
        figure.savefig(folder / Path(path).name)
