"""What a training run is made of: options, data, network, loaders, and where it goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import seed_everything
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet import ops
from pcenet.models import SavableModel
from pcenet.models.preprocessing import cost_of
from pcenet.ops.build import find_compiler
from pcenet.runs.config import DEFAULT_BATCH_SIZE, TrainConfig
from pcenet.runs.fingerprint import Fingerprint, fingerprint
from pcenet.runs.folder import RunFolder, images_per_step
from pcenet.runtime.device import resolve_precision, resolve_workers, set_precision
from pcenet.runtime.launcher import Ranks, ranks_of_environment
from pcenet.tasks import Task, get_task
from pcenet.tasks.classes import check_same_classes
from pcenet.texts import say
from pcenet.training.network import build_model, check_model, default_input_size, naming_model_args
from pcenet.training.resume import Position, first_intact, position_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a training run is made of."""

    config: TrainConfig
    task: Task
    folder: RunFolder
    device: torch.device
    ranks: Ranks
    workers: int
    sources: Mapping[data.Split, Any]
    model: SavableModel
    cost: dict[str, Any]
    loaders: dict[str, DataLoader[Any]]
    checkpoint: Path | None
    position: Position
    fingerprint: Fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values, kept in each checkpoint, by which it knows the run that it belongs to."""
        classes = list(self.sources["train"].classes)
        return {"config": asdict(self.config), "classes": classes, "data": self.fingerprint}


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The options with what is left to the program filled in: ``out``, ``model``, ``precision``, sizes.

    Raises:
        ValueError: for a model that does not exist, or an argument that it does not take; names the nearest. If there
            are not as many processes as the options say.
    """
    check_model(config)
    count = ranks_of_environment().count
    if config.devices not in (1, count):
        way_out = "give as many, or none" if count > 1 else "they are started by the command line, or by torchrun"
        raise ValueError(f"devices {config.devices}, but there are {count} processes; {way_out}")
    if config.strategy == "fsdp" and count == 1:
        raise ValueError("strategy 'fsdp' divides a network between processes: give --devices, or --strategy auto")
    return replace(
        config,
        devices=count,
        out=str(config.folder),
        model=config.model_name,
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE[config.task],
        precision=resolve_precision(config.precision, device),
        augment=config.augment if config.overfit is None else "none",
        input_size=config.input_size or default_input_size(config.model_name),
    )


def prepare(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    checkpoints: Sequence[Path] = (),
    batches: int | None = None,
) -> Run:
    """Open the data, seed, build network and loaders, find where to go on; nothing is written.

    Args:
        config: the options, resolved.
        folder: the run folder.
        device: where the run will compute.
        checkpoints: it goes on from the first of these that is intact; without any it starts afresh.
        batches: as in `train`.

    Raises:
        ValueError: for faulty data or arguments of the network, a checkpoint that is not of this run, or operators
            that cannot be had (``PCENET_OPS``).
    """
    ops.backend()  # decided, and compiled if need be, before time is spent on anything else
    set_precision(config.precision, device)
    if config.compile and find_compiler() is None:
        raise ValueError("compile: torch.compile needs a C++ compiler; install g++, or leave --compile out")
    task = get_task(config.task)
    sources = open_sources(config)
    classes = sources["train"].classes
    check_same_classes(classes, sources["val"].classes, "train", "val")
    known = fingerprint(sources)
    for finding in data.quick_check(sources):
        log.warning("%s: %s", config.data, finding.message)
    sources = choose_images(sources, config, batches)
    seed_everything(config.seed, workers=True, verbose=False)
    if config.pretrained and ":" in config.model_name and not checkpoints:
        say(f"getting the weights of {config.model_name}, from the Hugging Face Hub where they are not on this machine")
    model = build_model(config, classes, start=not checkpoints)
    with naming_model_args(config.model_args):
        cost = cost_of(model)
    task.tell_of_data(model, sources["train"], config.grey_range)
    ranks = ranks_of_environment()
    workers = resolve_workers(config.workers, device, ranks.local_count)
    assert config.batch_size is not None
    pin_memory = device.type == "cuda"
    loaders = {
        "train": task.train_loader(model, sources["train"], config, workers=workers, pin_memory=pin_memory),
        "val": task.eval_loader(
            model, sources["val"], batch_size=config.batch_size, workers=workers, pin_memory=pin_memory
        ),
    }
    for loader in loaders.values():
        assert isinstance(loader.sampler, data.EpochSampler)
        assert loader.batch_size is not None
        loader.sampler.divide(ranks.rank, ranks.count, loader.batch_size)
    checkpoint, position = None, Position()
    if checkpoints:
        checkpoint, position = first_intact(
            checkpoints,
            config,
            lambda path: position_of(path, folder, config, classes, known, model, len(loaders["train"])),
        )
    return Run(config, task, folder, device, ranks, workers, sources, model, cost, loaders, checkpoint, position, known)


def open_sources(config: TrainConfig) -> dict[data.Split, Any]:
    """The images for training and validation, all of them.

    Raises:
        ValueError: for faulty data.
    """
    splits: tuple[data.Split, ...] = ("train", "val")
    return {split: get_task(config.task).open(config, config.data, split) for split in splits}


def choose_images(sources: dict[data.Split, Any], config: TrainConfig, batches: int | None) -> dict[data.Split, Any]:
    """All images of the sources, or as few as the options or ``batches`` ask for.

    Raises:
        ValueError: if there are fewer images than are to be overfitted.
    """
    train, count = sources["train"], config.overfit
    if count is not None:
        if count > len(train):
            raise ValueError(f"overfit {count}: {train.name} has {len(train)} training images; give that or fewer")
        sources = dict.fromkeys(sources, data.first_images(train, count, config.seed))
    elif config.max_images is not None:
        sources = {**sources, "train": data.first_images(train, config.max_images, config.seed)}
    if batches is not None:
        assert config.batch_size is not None
        images = batches * config.batch_size * config.devices
        sources = {split: data.first_images(source, images, config.seed) for split, source in sources.items()}
    return sources


def steps_per_epoch(run: Run) -> int:
    """Steps of the optimiser in one pass over the training images."""
    return math.ceil(len(run.loaders["train"]) / run.config.accumulate)


def bias_count(images: int) -> int:
    """How many of the training images the routers' biases are found from: an eighth, but from 128 to 1,024."""
    return min(1024, max(128, images // 8))


def bias_images(run: Run) -> Iterator[torch.Tensor]:
    """Batches of the training images from which the routers' biases are found, prepared as for evaluation.

    They are as large as a step of all processes: biases, found batch by batch, depend on no number of processes.
    """
    config, source = run.config, run.sources["train"]
    some = data.first_images(source, bias_count(len(source)), config.seed)
    return run.task.images_of(run.task.eval_loader(run.model, some, batch_size=images_per_step(config), workers=0))
