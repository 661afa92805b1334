"""Figures as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from pcenet.reporting.numbers import percent
from pcenet.runs.health import Health, ratio_in_words
from pcenet.texts import shown

PIPE_WIDTH = 120


class Screen(Console):
    """Rich's console on stdout for texts from outside: they are `shown`, and no markup or emoji is seen in them."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width, markup=False, emoji=False)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        """What rich calls for every text, of a table's cells, too."""
        return super().render_str(shown(text), **options)


def console() -> Console:
    """The console on stdout: as wide as the terminal, 120 columns where there is none."""
    terminal = Screen()
    return terminal if terminal.is_terminal else Screen(PIPE_WIDTH)


def router_table(routers: Mapping[str, Health]) -> Table:
    """Router health at evaluation, a row per layer; ``dead`` counts the experts without a patch."""
    title = "router health at evaluation"
    table = Table("layer", "load per expert", "entropy", "max/min", "dropped", "dead", title=title)
    for name, health in routers.items():
        table.add_row(
            name or "(the model)",
            " ".join(f"{share:.1%}" for share in health["load"]),
            f"{health['entropy']:.3f}",
            ratio_in_words(health),
            percent(health["drop_rate"]),
            str(health["dead"]),
        )
    return table


def training_table(routers: Mapping[str, Mapping[str, float]]) -> Table:
    """What the last epoch of training tells of the routing, a row per layer."""
    title = "routing in training, where a bias evens out the loads of each batch"
    spread = "max - min"
    table = Table("layer", "dropped", f"bias, {spread}", f"a patch's logits, {spread}", title=title)
    for name, figures in routers.items():
        spreads = (figures.get(key) for key in ("bias_spread", "logit_spread"))
        cells = ("none" if value is None else f"{value:.2f}" for value in spreads)
        table.add_row(name or "(the model)", percent(figures.get("drop_rate")), *cells)
    return table
