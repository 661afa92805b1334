"""The bar that shows on a terminal how far a run is."""

from __future__ import annotations

from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from pcenet.reporting.tables import console

PERIOD = 600.0  # seconds of which the speed is taken: steps may take half a minute


class RunBar:
    """A bar of a whole run, with the epoch at work, its batches and the time left.

    It is a context, within which lines may be printed above it.

    Args:
        epochs: how many there will be.
        shown: False draws nothing.
    """

    def __init__(self, epochs: int, shown: bool) -> None:
        self.epochs = epochs
        self.shown = shown
        self.batches = 1
        self.epoch = self.done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        loss = TextColumn("loss {task.fields[loss]:.4f}")
        self.progress = Progress(
            *columns, loss, console=console(), disable=not shown, transient=True, speed_estimate_period=PERIOD
        )
        self.task = self.progress.add_task("", loss=0.0)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, epoch: int, batches: int, done: int) -> None:
        """Begin with an epoch, counted from 0, of which some batches may be done."""
        self.epoch, self.batches, self.done = epoch, batches, done
        self._draw()

    def advance(self, batches: int, loss: Tensor) -> None:
        """Go on by some batches; the last one's loss is read where it is shown alone: on a GPU that waits for it."""
        self.done += batches
        if self.shown:
            self.progress.update(self.task, loss=float(loss))
            self._draw()

    def _draw(self) -> None:
        self.progress.update(
            self.task,
            description=f"epoch {self.epoch + 1}/{self.epochs}, batch {self.done}/{self.batches}",
            completed=self.epoch * self.batches + self.done,
            total=self.epochs * self.batches,
        )
