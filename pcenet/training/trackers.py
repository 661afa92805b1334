"""Where figures and pictures of a run go beside its own files: TensorBoard, and a tracker that the options name."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.writing import write_text

PROJECT = "pcenet"

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What is told the figures of a run."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after this many optimiser steps."""

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, a PNG file, after this many optimiser steps."""

    def close(self) -> None:
        """There will be no more."""


class TensorBoard:
    """``logs/tensorboard``.

    Args:
        folder: the run folder, which exists.
        first_step: the first step that will be logged; what there is from it on is replaced.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder.logs / "tensorboard", purge_step=first_step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after this many optimiser steps."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # what a run that is killed has logged is there

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, a PNG file, after this many optimiser steps."""
        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """There will be no more."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, begun or gone on with.

    It obeys wandb's environment variables: with WANDB_MODE=offline everything stays in ``logs/wandb``.

    Args:
        folder: the run folder, which exists.
        config: the options of the run.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        import wandb

        self.run: Any = wandb.init(
            name=folder.path.resolve().name,
            id=kept_identity(folder.logs / "wandb-id"),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder.logs),
            resume="allow",
        )
        self.run.config.update(asdict(config), allow_val_change=True)
        self.run.define_metric("*", step_metric="step")  # its own counter goes on where a resumed run repeats steps

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after this many optimiser steps."""
        self.run.log({**figures, "step": step})

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, a PNG file, after this many optimiser steps."""
        import wandb

        self.run.log({name: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """There will be no more."""
        self.run.finish()


class Trackio:
    """A run of trackio, begun or gone on with.

    Its figures stay on this machine, or go to the Space that the environment variable TRACKIO_SPACE_ID names.

    Args:
        folder: the run folder, which exists.
        config: the options of the run; they go with the first figures.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        import trackio

        # trackio knows a run by its name alone, and folders of one name may lie in several places.
        name = f"{folder.path.resolve().name}-{kept_identity(folder.logs / 'trackio-id')[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(project=project, name=name, resume="allow", embed=False)
        self.run.config.update(asdict(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after this many optimiser steps."""
        self.run.log(dict(figures), step=step)

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, a PNG file, after this many optimiser steps."""
        import trackio

        self.run.log({name: trackio.Image(path)}, step=step)

    def close(self) -> None:
        """There will be no more."""
        self.run.finish()


# By the option's value: what the tracker is called, and what makes it.
TRACKERS: dict[str, tuple[str, Callable[[RunFolder, TrainConfig], Tracker]]] = {
    "wandb": ("Weights & Biases", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
}


def check_tracker(config: TrainConfig) -> None:
    """Raise a ``ModuleNotFoundError`` that says what to install where a tracker's package is missing."""
    name = config.log
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"log {name!r} needs {TRACKERS[name][0]}: pip install 'pcenet[{name}]'")


class Trackers:
    """Trackers as one. The first error of one is a warning and its end: a run outlives those who watch it.

    Args:
        makers: by title what makes each; that may fail, too.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        self.alive: dict[str, Tracker] = {}
        self.without_pictures: set[str] = set()
        for title, make in makers.items():
            with self.forgiving(title):
                self.alive[title] = make()

    @contextmanager
    def forgiving(self, title: str) -> Iterator[None]:
        """Give a tracker up after an error."""
        try:
            yield
        except Exception as error:  # whatever it is, training matters more
            self.alive.pop(title, None)
            log.warning("%s failed (%s: %s); training goes on without it", title, type(error).__name__, error)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after this many optimiser steps."""
        for title, tracker in list(self.alive.items()):
            with self.forgiving(title):
                tracker.log(figures, step)

    def show(self, path: Path, step: int) -> None:
        """A PNG file, called after its folder and itself, after this many optimiser steps.

        A tracker that fails to show it gets no more of them, but its figures.
        """
        for title, tracker in self.alive.items():
            if title in self.without_pictures:
                continue
            try:
                tracker.show(f"{path.parent.name}/{path.stem}", path, step)
            except Exception as error:  # whatever it is, training matters more
                self.without_pictures.add(title)
                log.warning(
                    "%s failed to show a picture (%s: %s); it gets no more of them", title, type(error).__name__, error
                )

    def close(self) -> None:
        """There will be no more."""
        for title, tracker in list(self.alive.items()):
            with self.forgiving(title):
                tracker.close()


@contextmanager
def tracking(config: TrainConfig, folder: RunFolder, first_step: int) -> Iterator[Trackers]:
    """TensorBoard, and the tracker that the options name; closed at the end.

    Args:
        config: the options.
        folder: the run folder, which exists.
        first_step: the first step that will be logged.
    """
    makers: dict[str, Callable[[], Tracker]] = {"TensorBoard": lambda: TensorBoard(folder, first_step)}
    if config.log in TRACKERS:
        title, make = TRACKERS[config.log]
        makers[title] = lambda: make(folder, config)
    with quiet_threads():
        trackers = Trackers(makers)
        try:
            yield trackers
        finally:
            trackers.close()


@contextmanager
def quiet_threads() -> Iterator[None]:
    """No tracebacks of threads: TensorBoard's writes in one, and raises the error again where it is called next."""
    before = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        threading.excepthook = before


def kept_identity(path: Path) -> str:
    """A name by which a tracker knows this run, so that it goes on when the run is resumed; kept in a file."""
    if not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
