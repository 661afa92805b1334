"""One training run from its options to its model: the order in which everything happens."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.choices import Split
from pcenet.models import SavableModel
from pcenet.training.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    History,
    RouterHealth,
    Throughput,
    TrainingBar,
    moving_average,
)
from pcenet.training.config import DEFAULT_BATCH_SIZE, TrainConfig
from pcenet.training.device import environment, resolve_device, resolve_precision, resolve_workers, set_threads
from pcenet.training.evaluate import check_classes
from pcenet.training.folder import RunFolder, write_atomically, write_json
from pcenet.training.kinds import Kind, kind_of
from pcenet.training.measures import cost_of
from pcenet.training.network import build_model, check_model, default_input_size, naming_model_args
from pcenet.training.resume import epochs_behind, read_checkpoint
from pcenet.training.router_schedules import RouterSchedules
from pcenet.training.schedules import Schedules
from pcenet.training.tables import console, router_table

LOG_EVERY = 50

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a training run is made of."""

    config: TrainConfig
    kind: Kind
    folder: RunFolder
    device: torch.device
    workers: int
    sources: Mapping[str, Any]
    model: SavableModel
    cost: dict[str, Any]
    loaders: dict[str, DataLoader[Any]]
    checkpoint: Path | None
    first_epoch: int


def train(config: TrainConfig) -> RunFolder:
    """``pcenet train``: train a network and leave the run folder.

    On the CPU two runs with the same options leave the same ``model/``, bit for bit, on one kind of processor
    and with the same versions and number of threads. On a GPU they do not: some of its kernels add in any order.

    Args:
        config: the options.

    Returns:
        The run folder with ``config.yaml``, ``environment.json``, ``logs/``, ``checkpoints/``,
        ``metrics.json`` and ``model/``.

    Raises:
        ValueError: for an unknown model, for faulty data, or if folder or checkpoint are of another run.
        FileNotFoundError: if ``config.resume`` names a checkpoint that does not exist.
        KeyboardInterrupt: if it was interrupted; ``last.ckpt`` holds the state after the last whole epoch.
    """
    set_threads(config.threads)
    device = resolve_device(config.device)
    config = resolve(config, device)
    folder = RunFolder(config.folder)
    checkpoint = folder.enter(config)
    if folder.finished:
        print(f"{folder.path} is finished; nothing to do")
        return folder
    run = prepare(config, folder, device, checkpoint)
    announce(run)
    folder.create(config, environment(device, config.precision) | {"workers": run.workers})
    history, health = fit(run)
    finish(run, history, health)
    return folder


def prepare(config: TrainConfig, folder: RunFolder, device: torch.device, checkpoint: Path | None) -> Run:
    """Open the data, seed, build network and loaders; nothing is written.

    Raises:
        ValueError: for faulty data or arguments of the network, or a checkpoint that is not of this run.
    """
    kind = kind_of(config.task)
    sources: dict[Split, Any] = {
        "train": kind.open(config, config.data, "train"),
        "val": kind.open(config, config.data, "val"),
    }
    classes = sources["train"].classes
    check_classes(classes, sources["val"].classes, "train", "val")
    for finding in data.quick_check(sources):
        log.warning("%s: %s", config.data, finding.message)
    first_epoch = epochs_behind(checkpoint, folder, config, classes) if checkpoint else 0
    L.seed_everything(config.seed, workers=True, verbose=False)
    with naming_model_args(config.model_args):
        model = build_model(config, len(classes))
        cost = cost_of(model)
    model.class_names = list(classes)
    workers = resolve_workers(config.workers, device)
    assert config.batch_size is not None
    pin_memory = device.type == "cuda"
    loaders = {
        "train": kind.train_loader(model, sources["train"], config, workers=workers, pin_memory=pin_memory),
        "val": kind.eval_loader(
            model, sources["val"], batch_size=config.batch_size, workers=workers, pin_memory=pin_memory
        ),
    }
    set_epoch(loaders["train"], first_epoch)
    return Run(config, kind, folder, device, workers, sources, model, cost, loaders, checkpoint, first_epoch)


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The options with what is left to the program filled in: ``out``, ``model``, ``precision``, sizes.

    Raises:
        ValueError: for a model that does not exist, or an argument that it does not take; names the nearest.
    """
    check_model(config)
    return replace(
        config,
        out=str(config.folder),
        model=config.model_name,
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE[config.task],
        precision=resolve_precision(config.precision, device),
        input_size=config.input_size or default_input_size(config.model_name),
    )


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Let a training loader start at ``epoch``; Lightning does so only after the workers have begun."""
    assert isinstance(loader.sampler, data.EpochSampler)
    loader.sampler.set_epoch(epoch)


def fit(run: Run) -> tuple[History, RouterHealth]:
    """Train with Lightning; the averaged weights end up in ``last.ckpt``."""
    config, folder = run.config, run.folder
    steps = math.ceil(len(run.loaders["train"]) / config.accumulate)
    history, health = History(folder.logs / "metrics.csv"), RouterHealth()
    checkpoints = Checkpoints(folder, {"config": asdict(config), "classes": list(run.sources["train"].classes)})
    callbacks = [moving_average(config.ema_decay), Throughput(), health, history, checkpoints]
    schedules = Schedules(config, steps)
    if schedules.of_the_routers:
        callbacks.append(RouterSchedules(schedules))
    terminal = sys.stdout.isatty()
    logger = TensorBoardLogger(folder.logs, name="", version="tensorboard", purge_step=run.first_epoch * steps)
    with quiet():
        trainer = L.Trainer(
            accelerator=run.device.type,
            devices=1,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_grad or None,
            callbacks=[*callbacks, TrainingBar()] if terminal else callbacks,
            enable_progress_bar=terminal,
            enable_model_summary=False,
            logger=logger,
            log_every_n_steps=min(LOG_EVERY, steps),
            num_sanity_val_steps=0,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder.path,
        )
        task = run.kind.make_task(run.model, config, run.sources["train"], steps)
        with interruptible(trainer):
            trainer.fit(task, run.loaders["train"], run.loaders["val"], ckpt_path=run.checkpoint, weights_only=True)
    return history, health


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notes and its hints on performance."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Turn Lightning's exit 1 after Ctrl-C back into KeyboardInterrupt; give the signal its handler back."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def announce(run: Run) -> None:
    """Say what is going to be trained, on what, and where it goes."""
    config, cost, sources = run.config, run.cost, run.sources
    lines = [
        f"{config.model}: {cost['parameters'] / 1e6:.2f} M parameters,"
        f" {cost['active_parameters'] / 1e6:.2f} M active; {cost['multiply_adds'] / 1e6:.1f} M multiply-adds"
        f" at {config.input_size} px, {cost['router_share']:.1%} of them the router's",
        f"{config.data}: {len(sources['train'])} training and {len(sources['val'])} validation images,"
        f" {len(sources['train'].classes)} classes",
        f"{config.precision}, {torch.get_num_threads()} threads, seed {config.seed}",
        f"run folder: {run.folder.path}",
    ]
    if run.checkpoint:
        lines.append(f"continuing from {run.checkpoint} after epoch {run.first_epoch}")
    print("\n".join(lines), flush=True)


def finish(run: Run, history: History, health: RouterHealth) -> None:
    """Write ``model/`` from the averaged weights of ``last.ckpt``, measure it, write ``metrics.json``."""
    config, folder, model, source = run.config, run.folder, run.model, run.sources["val"]
    averaged = read_checkpoint(folder.last)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in averaged.items()})
    write_atomically(folder.model, model.save_pretrained)
    result = run.kind.evaluate(model, run.loaders["val"], source.classes, device=run.device, precision=config.precision)
    write_json(folder.metrics, summary(run, history, health, result))
    print(f"validation {run.kind.headline(result)}")
    if health.health:
        console().print(router_table(health.health))
    print(f"model: {folder.model}")


def summary(run: Run, history: History, health: RouterHealth, result: Any) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    score = run.kind.task.score
    best = max(history.rows, key=lambda row: row[f"val/{score}"])
    return {
        "task": run.config.task,
        "model": run.config.model,
        "data": run.config.data,
        "seed": run.config.seed,
        "epochs": len(history.rows),
        "val": run.kind.summary(result),
        "best": {"epoch": int(best["epoch"]), score: best[f"val/{score}"]},
        "epoch_seconds": statistics.median(row["train/epoch_seconds"] for row in history.rows),
        "images_per_second": statistics.median(row["train/images_per_second"] for row in history.rows),
        "complexity": run.cost,
        "router": health.health,
    }
