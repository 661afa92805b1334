"""One training run from its options to its model: the order in which everything happens."""

from __future__ import annotations

import logging
import pickle
import signal
import statistics
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.models import SavableModel, list_models
from pcenet.training.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    History,
    RouterHealth,
    Throughput,
    TrainingBar,
    moving_average,
)
from pcenet.training.config import TrainConfig, nearest
from pcenet.training.device import environment, resolve_device, resolve_precision, resolve_workers, set_threads
from pcenet.training.evaluate import check_classes, evaluate_model, model_loader
from pcenet.training.folder import RunFolder, write_atomically, write_json
from pcenet.training.measures import Evaluation, cost_of, image_side, preprocessing
from pcenet.training.tables import console, percent, router_table
from pcenet.training.task import ClassificationTask

LOG_EVERY = 50


@dataclass(frozen=True)
class Run:
    """Everything that a training run is made of."""

    config: TrainConfig
    folder: RunFolder
    device: torch.device
    sources: dict[str, data.ImageSource]
    model: SavableModel
    loaders: dict[str, DataLoader[Any]]
    checkpoint: Path | None
    first_epoch: int


def train(config: TrainConfig) -> RunFolder:
    """``pcenet train``: train a network and leave the run folder.

    Two runs with the same options leave the same ``model/``, bit for bit, on one kind of processor and with
    the same number of threads.

    Args:
        config: the options.

    Returns:
        The run folder with ``config.yaml``, ``environment.json``, ``logs/``, ``checkpoints/``,
        ``metrics.json`` and ``model/``.

    Raises:
        ValueError: for an unknown model, for faulty data, or if the folder holds another run.
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
    folder.create(config, environment(device, config.precision))
    announce(run)
    history, health = fit(run)
    finish(run, history, health)
    return folder


def prepare(config: TrainConfig, folder: RunFolder, device: torch.device, checkpoint: Path | None) -> Run:
    """Open the data, seed, build network and loaders; nothing is written."""
    sources = {split: data.open_source(config.data, split) for split in ("train", "val")}
    classes = sources["train"].classes
    check_classes(classes, sources["val"].classes, "train", "val")
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(config, len(classes))
    model.class_names = list(classes)
    loaders = build_loaders(model, sources, config, pin_memory=device.type == "cuda")
    first_epoch = epochs_done(checkpoint)
    set_epoch(loaders["train"], first_epoch)
    return Run(config, folder, device, sources, model, loaders, checkpoint, first_epoch)


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The options with ``out``, ``precision``, ``workers`` and ``input_size`` filled in.

    Raises:
        ValueError: for a model that does not exist; names the nearest.
    """
    names = list_models()
    if config.model not in names:
        raise ValueError(f"model {config.model!r} is unknown; did you mean {nearest(config.model, names)!r}?")
    cfg = timm.get_pretrained_cfg(config.model)
    assert cfg is not None
    return replace(
        config,
        out=str(config.folder),
        precision=resolve_precision(config.precision, device),
        workers=resolve_workers(config.workers, device),
        input_size=config.input_size or cfg.input_size[-1],
    )


def build_model(config: TrainConfig, num_classes: int) -> SavableModel:
    """The untrained network; its weights depend on the state of torch's generator alone.

    Raises:
        ValueError: for ``model_args`` that the network does not take.
    """
    overlay = {
        "input_size": (3, config.input_size, config.input_size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path,
        "pretrained_cfg_overlay": overlay,
    }
    if taken := arguments.keys() & config.model_args.keys():
        raise ValueError(
            f"model_args: {', '.join(sorted(taken))} cannot be given there: an option or the data decide it"
        )
    try:
        model = timm.create_model(config.model, **arguments, **config.model_args)
    except TypeError as error:
        raise ValueError(f"model_args: {error}") from error
    assert isinstance(model, SavableModel)
    return model.to(memory_format=torch.channels_last)


def build_loaders(
    model: SavableModel, sources: dict[str, data.ImageSource], config: TrainConfig, pin_memory: bool
) -> dict[str, DataLoader[Any]]:
    """Augmented, shuffled batches for training and plain ones for validation."""
    values = preprocessing(model)
    size, mean, std = image_side(model), values["mean"], values["std"]
    flip = sources["train"].horizontal_flip
    transforms = {
        "train": data.train_transform(size, augment=config.augment, horizontal_flip=flip, mean=mean, std=std),
        "val": data.eval_transform(size, mean=mean, std=std),
    }
    return {
        split: data.build_loader(
            sources[split],
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            train=split == "train",
            workers=config.workers or 0,
            pin_memory=pin_memory,
        )
        for split, transform in transforms.items()
    }


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Let a training loader start at ``epoch``; Lightning does so only after the workers have begun."""
    assert isinstance(loader.sampler, data.EpochSampler)
    loader.sampler.set_epoch(epoch)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain values are accepted, never code.

    Raises:
        ValueError: if the file is not a checkpoint of a training run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["callbacks"]["History"]["rows"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of pcenet train ({type(error).__name__})") from error
    return dict(content)


def epochs_done(checkpoint: Path | None) -> int:
    """Whole epochs behind a checkpoint; 0 for None."""
    return len(read_checkpoint(checkpoint)["callbacks"]["History"]["rows"]) if checkpoint else 0


def fit(run: Run) -> tuple[History, RouterHealth]:
    """Train with Lightning; the averaged weights end up in ``last.ckpt``."""
    config, folder, steps = run.config, run.folder, len(run.loaders["train"])
    history, health = History(folder.logs / "metrics.csv"), RouterHealth()
    callbacks = [moving_average(config.ema_decay), Throughput(), health, history, Checkpoints(folder)]
    terminal = sys.stdout.isatty()
    logger = TensorBoardLogger(folder.logs, name="", version="tensorboard", purge_step=run.first_epoch * steps)
    with quiet():
        trainer = L.Trainer(
            accelerator=run.device.type,
            devices=1,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            max_epochs=config.epochs,
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
        task = ClassificationTask(run.model, config, steps_per_epoch=steps)
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
    config, cost, sources = run.config, cost_of(run.model), run.sources
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
    batches = model_loader(model, source, batch_size=config.batch_size, workers=config.workers or 0)
    result = evaluate_model(model, batches, source.classes, device=run.device, precision=config.precision)
    write_json(folder.metrics, summary(run, history, health, result))
    print(f"validation top-1 {percent(result.top1)}, top-5 {percent(result.top5)}")
    if health.health:
        console().print(router_table(health.health))
    print(f"model: {folder.model}")


def summary(run: Run, history: History, health: RouterHealth, result: Evaluation) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    best = max(history.rows, key=lambda row: row["val/top1"])
    measured = asdict(result)
    return {
        "model": run.config.model,
        "data": run.config.data,
        "seed": run.config.seed,
        "epochs": len(history.rows),
        "val": {name: measured[name] for name in ("images", "loss", "top1", "top5", "calibration_error")},
        "best": {"epoch": int(best["epoch"]), "top1": best["val/top1"]},
        "epoch_seconds": statistics.median(row["train/epoch_seconds"] for row in history.rows),
        "images_per_second": statistics.median(row["train/images_per_second"] for row in history.rows),
        "complexity": cost_of(run.model),
        "router": health.health,
    }
