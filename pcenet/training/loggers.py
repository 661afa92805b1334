"""Where the figures of a run go beside ``metrics.csv``."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from pcenet.training.config import TrainConfig
from pcenet.training.folder import RunFolder, write_text

PROJECT = "pcenet"


def check_logging(config: TrainConfig) -> None:
    """Raise a ``ModuleNotFoundError`` that says what to install where a logger's package is missing."""
    if config.log == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("log 'wandb' needs Weights & Biases: pip install 'pcenet[wandb]'")


@contextmanager
def run_loggers(config: TrainConfig, folder: RunFolder, first_step: int) -> Iterator[list[Logger]]:
    """The loggers that the options ask for, TensorBoard's first; closed at the end.

    Weights & Biases obeys its environment variables: with WANDB_MODE=offline it keeps everything in ``logs/wandb``.

    Args:
        config: the options.
        folder: the run folder, which exists.
        first_step: the first step that will be logged; what TensorBoard has from there on is replaced.
    """
    board = TensorBoardLogger(folder.logs, name="", version="tensorboard", purge_step=first_step)
    if config.log != "wandb":
        yield [board]
        return
    wandb = WandbLogger(
        name=folder.path.resolve().name,
        id=kept_identity(folder.logs / "wandb-id"),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        save_dir=folder.logs,
    )
    wandb.log_hyperparams(asdict(config))
    try:
        yield [board, wandb]
    finally:
        wandb.experiment.finish()


def kept_identity(path: Path) -> str:
    """A name by which wandb knows this run, so that it goes on when the run is resumed; kept in a file."""
    if not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
