"""Checkpoints: whole or not there, and never believed unless they are intact.

A checkpoint is a folder, ``checkpoints/step-00000120``, with ``state.ckpt`` (tensors and plain values) and a manifest
(see `pcenet.runs.manifest`). It is written under a temporary name, flushed to the disk, and then given its own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from pcenet.runs.folder import RunFolder
from pcenet.runs.manifest import STATE, fault_of, seal
from pcenet.runtime.distributed import largest
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.runtime.signals import Stop, end_by
from pcenet.training.contents import fault_in
from pcenet.training.module import TrainingModule
from pcenet.training.stopping import stopped_by
from pcenet.writing import discard, replacing

KEPT = 2  # newest checkpoints that are kept, beside that of the best epoch


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint. ``path`` is complete or absent at any moment; one of that name is replaced.

    Raises:
        OSError: naming what could not be written, such as on a full disk; nothing is left of it.
    """
    with replacing(path) as folder:
        folder.mkdir()
        with open(folder / STATE, "wb") as file:
            torch.save(dict(content), file)
        seal(folder)


class DamagedError(ValueError):
    """A checkpoint is not intact; says which, and what is wrong."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain values are accepted, never code.

    Raises:
        DamagedError: if it is not intact, or no checkpoint of a training run.
    """
    if fault := fault_of(path):
        raise DamagedError(f"{path} {fault}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch warns of a pickle that it would not have written
            content = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none of torch's can make it raise whatever there is
        if ran_out_of_memory(error):
            raise
        kind = type(error).__name__
        raise DamagedError(f"{path} is damaged or no checkpoint of pcenet train ({kind})") from error
    if fault := fault_in(content):
        raise DamagedError(f"{path} is damaged or no checkpoint of pcenet train: {fault}")
    return dict(content)


class CheckpointFiles(TorchCheckpointIO):
    """Lets Lightning write and read checkpoints by `write_checkpoint` and `read_checkpoint`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint."""
        write_checkpoint(Path(path), checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; code is refused, whatever ``weights_only`` says."""
        return read_checkpoint(Path(path))


class Checkpoints(Checkpoint):
    """Writes checkpoints: after every epoch, every few minutes within one, and before a signal ends training.

    Kept are the newest two and that of the epoch with the best validation score. Lightning's ModelCheckpoint stores
    absolute paths, knows no manifest, and forgets its best score when the folder was moved.

    Args:
        folder: where they go.
        run: plain values, kept in each checkpoint under ``"run"``, by which it knows the run that it belongs to.
        minutes: the time between two within an epoch; None: none there.
        stop: knows whether a signal has asked for the end.
    """

    def __init__(self, folder: RunFolder, run: dict[str, Any], minutes: float | None, stop: Stop) -> None:
        self.folder = folder
        self.run = run
        self.minutes = minutes
        self.stop = stop
        self.best = -1.0
        self.best_step = -1
        self.batches = 0  # of the epoch at work, behind the checkpoint that is being written

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.written = time.monotonic()
        self.stop.patient = True
        self.stop.listen()  # Lightning has put a handler of its own in the place of SIGTERM's

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where the last batch ends an epoch, validation comes first: Lightning resumes before it or after it."""
        if trainer.is_last_batch or trainer.should_stop or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        due = self.minutes is not None and time.monotonic() - self.written >= 60 * self.minutes
        if any(largest([due, self.stop.signal])):  # of all processes, so that they end after the same step
            self.write(trainer, batch_idx + 1)
            end_by(largest([self.stop.signal])[0])

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        score = float(trainer.callback_metrics[f"val/{pl_module.objective.score}"])
        if score > self.best:
            self.best, self.best_step = score, trainer.global_step
        self.write(trainer, 0)
        end_by(largest([self.stop.signal])[0])

    def write(self, trainer: L.Trainer, batches: int) -> None:
        """Write one, and remove what need not be kept."""
        self.batches = batches
        trainer.save_checkpoint(self.folder.checkpoint(trainer.global_step))
        self.written = time.monotonic()
        if not trainer.is_global_zero:
            return
        best = self.folder.checkpoint(self.best_step)
        for path in self.folder.steps[:-KEPT]:
            if path != best:
                discard(path)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        stopped = stopped_by(trainer, pl_module.schedules.total_steps)
        checkpoint["run"] = self.run | {"batches": self.batches, "stopped": stopped}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
