"""Figures as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from pcenet.texts import shown
from pcenet.training.measures import CALIBRATION_BINS, TOP_K, Evaluation, PixelEvaluation

PIPE_WIDTH = 120
WIDEST_CONFUSION = 12


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


def percent(value: float | None) -> str:
    """A share as a percentage, or n/a."""
    return "n/a" if value is None else f"{value:.2%}"


def router_table(router: dict[str, dict[str, Any]]) -> Table:
    """Router health, a row per layer."""
    table = Table("layer", "load per expert", "entropy", "max/min", "dropped", "dead", title="router health")
    for name, health in router.items():
        table.add_row(
            name or "(the model)",
            " ".join(f"{share:.1%}" for share in health["load"]),
            f"{health['entropy']:.3f}",
            "inf" if health["max_min"] is None else f"{health['max_min']:.2f}",
            percent(health["drop_rate"]),
            ", ".join(map(str, health["dead"])) or "none",
        )
    return table


def show(result: Evaluation, title: str) -> None:
    """Print an evaluation as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    top5 = percent(result.top5) if result.top5 is not None else f"n/a (fewer than {TOP_K} classes)"
    for label, value in (
        ("images", str(result.images)),
        ("top-1", percent(result.top1)),
        ("top-5", top5),
        ("cross-entropy", f"{result.loss:.4f}"),
        (f"calibration error ({CALIBRATION_BINS} bins)", percent(result.calibration_error)),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    names = list(result.per_class)
    wide = len(names) > WIDEST_CONFUSION
    table = Table("class", "images", "accuracy", *([] if wide else names), title="per class; right: predicted as")
    for name, row in zip(names, result.confusion, strict=True):
        entry = result.per_class[name]
        table.add_row(name, str(entry["images"]), percent(entry["accuracy"]), *([] if wide else map(str, row)))
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))


def show_pixels(result: PixelEvaluation, title: str) -> None:
    """Print an evaluation of a segmentation network as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    for label, value in (
        ("images", str(result.images)),
        ("mIoU", percent(result.miou)),
        ("pixel accuracy", percent(result.pixel_accuracy)),
        ("cross-entropy", f"{result.loss:.4f}"),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    table = Table("class", "share of pixels", "IoU", "accuracy")
    for name, entry in result.per_class.items():
        table.add_row(name, *(percent(entry[key]) for key in ("share", "iou", "accuracy")))
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))
