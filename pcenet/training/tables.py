"""Figures as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from pcenet.texts import shown
from pcenet.training.health import Health, ratio_in_words
from pcenet.training.measures import CALIBRATION_BINS, TOP_K, Evaluation, PixelEvaluation, score_digits

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


def score_text(score: float | None, images: int) -> str:
    """A score as a percentage, or n/a; no digit is finer than one of the images that it was measured on."""
    return "n/a" if score is None else f"{score:.{score_digits(images)}%}"


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
        table.add_row(name or "(the model)", percent(figures["drop_rate"]), *cells)
    return table


def show(result: Evaluation, title: str) -> None:
    """Print an evaluation as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    images = result.images
    top5 = score_text(result.top5, images) if result.top5 is not None else f"n/a (fewer than {TOP_K} classes)"
    for label, value in (
        ("images", str(images)),
        ("top-1", score_text(result.top1, images)),
        ("top-5", top5),
        ("cross-entropy", f"{result.loss:.4f}"),
        (f"calibration error ({CALIBRATION_BINS} bins)", score_text(result.calibration_error, images)),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    names = list(result.per_class)
    wide = len(names) > WIDEST_CONFUSION
    table = Table("class", "images", "accuracy", *([] if wide else names), title="per class; right: predicted as")
    for name, row in zip(names, result.confusion, strict=True):
        entry = result.per_class[name]
        accuracy = score_text(entry["accuracy"], entry["images"])
        table.add_row(name, str(entry["images"]), accuracy, *([] if wide else map(str, row)))
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))


def show_pixels(result: PixelEvaluation, title: str) -> None:
    """Print an evaluation of a segmentation network as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    for label, value in (
        ("images", str(result.images)),
        ("mIoU", score_text(result.miou, result.images)),
        ("pixel accuracy", score_text(result.pixel_accuracy, result.images)),
        ("cross-entropy", f"{result.loss:.4f}"),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    table = Table("class", "share of pixels", "IoU", "accuracy")
    for name, entry in result.per_class.items():
        scores = (score_text(entry[key], result.images) for key in ("iou", "accuracy"))
        table.add_row(name, percent(entry["share"]), *scores)
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))
