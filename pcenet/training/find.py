"""``pcenet train --find``: suggestions for the learning rate and the batch size, by Lightning's tuner."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.device import resolve_device, set_threads
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.texts import say
from pcenet.training.run import Run, make_module, prepare, quiet, resolve, trainer_options

LEARNING_RATES = (1e-6, 1.0)
STEPS = 100
LARGEST_BATCH = 8192


def find(config: TrainConfig) -> float:
    """Print and return a suggestion; nothing is trained and nothing is written.

    Args:
        config: the options of the run to come; ``find`` says what is asked for.

    Raises:
        ValueError: for faulty options or data; for the batch size without a GPU; where no suggestion can be made.
    """
    if ranks_of_environment().count > 1:
        raise ValueError(f"find {config.find!r} tries one process alone: start it without torchrun")
    set_threads(config.threads)
    device = resolve_device(config.device)
    if config.find == "batch-size" and device.type != "cuda":
        raise ValueError(
            "find 'batch-size' needs a GPU, where a batch that does not fit is an error: a processor's memory spills "
            "onto the disk, or the system ends the program; on processors larger batches are hardly faster: give "
            "--batch-size"
        )
    with tempfile.TemporaryDirectory(prefix="pcenet-") as folder:
        run = prepare(resolve(config, device), RunFolder(Path(folder)), device)
        suggestion = find_lr(run) if config.find == "lr" else find_batch_size(run)
    say(f"suggestion: --{config.find} {suggestion:.4g}")
    return suggestion


def find_lr(run: Run) -> float:
    """The learning rate at which the loss falls fastest while it rises from 1e-6 to 1 over 100 steps.

    Raises:
        ValueError: if the loss explodes before there is enough to go by.
    """
    low, high = LEARNING_RATES
    with quiet():
        trainer = tuning_trainer(run)
        module = make_module(run)
        found = Tuner(trainer).lr_find(
            module, run.loaders["train"], min_lr=low, max_lr=high, num_training=STEPS, update_attr=False
        )
        suggestion = found.suggestion() if found else None
    if suggestion is None:
        raise ValueError("find 'lr': the loss exploded within the first steps; check data and options with --dry-run")
    return float(suggestion)


def find_batch_size(run: Run) -> int:
    """The largest power of two that fits into the device's memory in training, up to 8192 and the number of images."""
    with quiet():
        trainer = tuning_trainer(run)
        module = make_module(run)
        # The tuner gives its limit, or a batch of more than all images, without having filled one: both lie above ours.
        found = Tuner(trainer).scale_batch_size(module, datamodule=Batches(run), max_val=2 * LARGEST_BATCH)
    assert found is not None
    images = len(run.sources["train"])
    return min(found, LARGEST_BATCH, 1 << (images.bit_length() - 1))


def tuning_trainer(run: Run) -> L.Trainer:
    """A trainer that logs nothing and validates nothing; the tuner keeps its checkpoints in the run's folder."""
    return L.Trainer(
        **trainer_options(run),
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=run.folder.path,
    )


class Batches(L.LightningDataModule):
    """A run's training images in batches of a size that the tuner sets; it looks no further where the first one has all
    images."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.batch_size = 1

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the size of now."""
        run = self.run
        config = replace(run.config, batch_size=self.batch_size)
        return run.task.train_loader(
            run.model, run.sources["train"], config, workers=run.workers, pin_memory=run.device.type == "cuda"
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The run's validation images, which the tuner asks for."""
        return self.run.loaders["val"]
