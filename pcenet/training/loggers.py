"""Where the figures of a run go beside ``metrics.csv``."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from typing_extensions import override

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.writing import write_text

PROJECT = "pcenet"

log = logging.getLogger(__name__)


def check_logging(config: TrainConfig) -> None:
    """Raise a ``ModuleNotFoundError`` that says what to install where a logger's package is missing."""
    name = config.log
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"log {name!r} needs {TRACKERS[name][0]}: pip install 'pcenet[{name}]'")


class Forgiving(Logger):
    """Another logger, whose first error is a warning and its end: a run outlives those who watch it.

    Args:
        title: what to call it in the warning.
        make: makes it; that may fail, too.
    """

    def __init__(self, title: str, make: Callable[[], Logger]) -> None:
        self.title = title
        self.failed = False
        self._logger: Logger | None = None
        self.attempt(lambda _: None, make)

    def attempt(self, act: Callable[[Any], object], make: Callable[[], Logger] | None = None) -> None:
        """Do something with the logger, unless it has failed before."""
        if self.failed:
            return
        try:
            if make is not None:
                self._logger = make()
            act(self._logger)
        except Exception as error:  # whatever it is, training matters more
            self.failed = True
            log.warning("%s failed (%s: %s); training goes on without it", self.title, type(error).__name__, error)

    @property
    @override
    def name(self) -> str:
        return self.title

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Figures of a step."""
        self.attempt(lambda logger: logger.log_metrics(metrics, step))

    @override
    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        """The options of the run."""
        self.attempt(lambda logger: logger.log_hyperparams(params, *arguments, **options))

    @override
    def save(self) -> None:
        """Flush."""
        self.attempt(lambda logger: logger.save())

    @override
    def finalize(self, status: str) -> None:
        """The end."""
        self.attempt(lambda logger: logger.finalize(status))


@contextmanager
def run_loggers(config: TrainConfig, folder: RunFolder, first_step: int) -> Iterator[list[Logger]]:
    """The loggers that the options ask for, TensorBoard's first; closed at the end. One that fails is left out.

    Weights & Biases and trackio obey their environment variables: with WANDB_MODE=offline the former keeps everything
    in ``logs/wandb``; TRACKIO_SPACE_ID sends the latter's figures to a Space, which else stay on this machine.

    Args:
        config: the options.
        folder: the run folder, which exists.
        first_step: the first step that will be logged; what TensorBoard has from there on is replaced.
    """
    with quiet_threads():
        board = Forgiving("TensorBoard", lambda: tensorboard(folder, first_step))
        if config.log == "tensorboard":
            yield [board]
            return
        title, make = TRACKERS[config.log]
        tracker = Forgiving(title, lambda: make(folder))
        tracker.log_hyperparams(asdict(config))
        try:
            yield [board, tracker]
        finally:
            tracker.attempt(lambda logger: logger.experiment.finish())


def tensorboard(folder: RunFolder, first_step: int) -> Logger:
    """TensorBoard's logger, its file opened."""
    logger = TensorBoardLogger(folder.logs, name="", version="tensorboard", purge_step=first_step)
    _ = logger.experiment
    return logger


def weights_and_biases(folder: RunFolder) -> Logger:
    """Weights & Biases' logger, its run begun or gone on with."""
    return WandbLogger(
        name=folder.path.resolve().name,
        id=kept_identity(folder.logs / "wandb-id"),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        save_dir=folder.logs,
    )


class TrackioLogger(Logger):
    """trackio's logger; Lightning and trackio have none.

    Args:
        folder: the run folder, which exists.

    Attributes:
        experiment: trackio's run, begun or gone on with.
    """

    def __init__(self, folder: RunFolder) -> None:
        import trackio

        # trackio knows a run by its name alone, and folders of one name may lie in several places.
        self._name = f"{folder.path.resolve().name}-{kept_identity(folder.logs / 'trackio-id')[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.experiment = trackio.init(project=project, name=self._name, resume="allow", embed=False)

    @property
    @override
    def name(self) -> str:
        return self._name

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Figures of a step."""
        self.experiment.log(metrics, step=step)

    @override
    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        """The options of the run, a dictionary; they go with the first figures."""
        self.experiment.config.update(params)


# What follows the training beside TensorBoard: its title, and its logger, of which `experiment` has a method `finish`.
TRACKERS: dict[str, tuple[str, Callable[[RunFolder], Logger]]] = {
    "wandb": ("Weights & Biases", weights_and_biases),
    "trackio": ("trackio", TrackioLogger),
}


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
