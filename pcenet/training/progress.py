"""The bar that shows on a terminal how far an epoch is."""

from __future__ import annotations

from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pcenet.reporting.tables import console


class EpochBar:
    """A bar of batches; a context, within which lines may be printed above it.

    Args:
        epochs: how many there will be.
        shown: False draws nothing.
    """

    def __init__(self, epochs: int, shown: bool) -> None:
        self.epochs = epochs
        self.shown = shown
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        loss = TextColumn("loss {task.fields[loss]:.4f}")
        self.progress = Progress(*columns, loss, console=console(), disable=not shown, transient=True)
        self.task = self.progress.add_task("", loss=0.0)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, epoch: int, batches: int, done: int) -> None:
        """Begin with an epoch, counted from 0, of which some batches may be done."""
        description = f"epoch {epoch + 1}/{self.epochs}"
        self.progress.reset(self.task, total=batches, completed=done, description=description)

    def advance(self, batches: int, loss: Tensor) -> None:
        """Go on by some batches; the last one's loss is read where it is shown alone: on a GPU that waits for it."""
        if self.shown:
            self.progress.update(self.task, advance=batches, loss=float(loss))
