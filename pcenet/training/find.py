"""``pcenet train --find``: suggestions for the learning rate and the batch size."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcenet.data import EpochSampler
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.device import resolve_device, set_threads
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.runtime.signals import Stop
from pcenet.texts import say
from pcenet.training.loop import Trainer
from pcenet.training.preparation import Run, prepare, resolve
from pcenet.training.progress import RunBar
from pcenet.training.trackers import Trackers

LEARNING_RATES = (1e-6, 1.0)
STEPS = 100
SMOOTHING = 0.98  # of the losses that are compared, as in fastai and Lightning
SETTLING = 10  # steps that are passed over at the beginning, until the average has settled
EXPLODED = 4.0  # times the lowest loss so far
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


def trainer_of(run: Run) -> Trainer:
    """What trains a run's network, without telling anybody."""
    return Trainer(run, Stop(), Trackers({}), RunBar(run.config.epochs, shown=False))


def find_lr(run: Run) -> float:
    """The learning rate at which the loss falls fastest while it rises from 1e-6 to 1 over 100 steps.

    That is Smith's range test ("Cyclical Learning Rates for Training Neural Networks", 2017). Steepness is that of the
    loss over the rate's logarithm: over the rate itself, rounding decides among the smallest rates.

    Raises:
        ValueError: if the loss explodes before there is enough to go by.
    """
    trainer = trainer_of(run)
    low, high = LEARNING_RATES
    rates, losses, average, lowest = [], [], 0.0, math.inf
    batches = enumerate(endless(run))
    for step in range(STEPS):
        rates.append(low * (high / low) ** (step / STEPS))
        seen, norm = trainer.backward(islice(batches, run.config.accumulate), run.config.accumulate)
        trainer.update(norm, rates[-1])
        average = SMOOTHING * average + (1 - SMOOTHING) * float(seen[-1].values["loss"])
        losses.append(average / (1 - SMOOTHING ** (step + 1)))
        lowest = min(lowest, losses[-1])
        if not losses[-1] <= EXPLODED * lowest:
            break
    rates, losses = rates[SETTLING:-1], losses[SETTLING:-1]
    if len(losses) < 2:
        raise ValueError("find 'lr': the loss exploded within the first steps; check data and options with --dry-run")
    return rates[int(np.gradient(losses, np.log(rates)).argmin())]


def endless(run: Run) -> Iterator[Any]:
    """A run's training batches, epoch after epoch."""
    loader = run.loaders["train"]
    assert isinstance(loader.sampler, EpochSampler)
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def find_batch_size(run: Run) -> int:
    """The largest power of two that fits into the device's memory in training, up to 8192 and the number of images."""
    trainer = trainer_of(run)
    images = len(run.sources["train"])
    size = 1
    while 2 * size <= min(images, LARGEST_BATCH) and fits(trainer, 2 * size):
        size *= 2
    return size


def fits(trainer: Trainer, size: int) -> bool:
    """Whether two steps with batches of a size, the second with the optimiser's state, fit into the memory."""
    run = trainer.run
    config = replace(run.config, batch_size=size)
    loader = run.task.train_loader(run.model, run.sources["train"], config, workers=run.workers, pin_memory=False)
    batch = next(iter(loader))
    try:
        for step in range(2):
            _, norm = trainer.backward([(step, batch)], 1)
            trainer.update(norm, 0.0)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return False
    finally:
        trainer.state.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    return True
