"""One training run from its options to its model: the order in which everything happens."""

from __future__ import annotations

import io
import logging
import math
import shlex
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet import ops
from pcenet.models import SavableModel, TimmNet
from pcenet.models.preprocessing import cost_of
from pcenet.ops.library import REFERENCE_COST
from pcenet.reporting.plots import drawing, pictures_of, save_pictures
from pcenet.reporting.tables import console, router_table, training_table
from pcenet.runs.config import DEFAULT_BATCH_SIZE, TrainConfig
from pcenet.runs.folder import RunFolder, images_per_step
from pcenet.runs.health import EVALUATED, TRAINED, complaint, training_of
from pcenet.runtime.device import environment, resolve_device, resolve_precision, resolve_workers, set_threads
from pcenet.runtime.distributed import agreeing, decide, share, together
from pcenet.runtime.launcher import Ranks, ranks_of_environment
from pcenet.runtime.signals import Stop, listening
from pcenet.tasks import Task, get_task
from pcenet.tasks.evaluation import check_classes
from pcenet.texts import say
from pcenet.training.callbacks import (
    Averaging,
    EpochFigures,
    ExpertBiases,
    History,
    RouterHealth,
    Throughput,
    TrainingBar,
)
from pcenet.training.checkpoints import CheckpointFiles, Checkpoints, read_checkpoint
from pcenet.training.loggers import check_logging, run_loggers
from pcenet.training.module import TrainingModule
from pcenet.training.network import build_model, check_model, default_input_size, naming_model_args
from pcenet.training.nonfinite import FiniteSteps
from pcenet.training.resume import Fingerprint, Position, fingerprint, first_intact, position_of
from pcenet.training.router_schedules import RouterSchedules
from pcenet.training.schedules import Schedules
from pcenet.training.stopping import stopped_by, stopping_callbacks
from pcenet.training.strategies import strategy_options, synchronised
from pcenet.writing import write_atomically, write_json

LOG_EVERY = 50
FEW_STEPS = 3  # in an epoch; below it there is a hint, to make at least so many:
ENOUGH_STEPS = 5
SAME_SIGNAL = 1.0  # seconds in which a batch system and torchrun, or our launcher, may send a process the same one

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


def train(config: TrainConfig, batches: int | None = None) -> RunFolder:
    """``pcenet train``: train a network and leave the run folder; one of several processes does its part of it.

    On the CPU two runs with the same options leave the same ``model/``, bit for bit, on one kind of processor
    and with the same versions, operators (``PCENET_OPS``) and number of threads. On a GPU they do not: some of its
    kernels add in any order.

    Args:
        config: the options.
        batches: train and validate on so many batches of images only, to try everything out; None: on all.

    Returns:
        The run folder with ``config.yaml``, ``environment.json``, ``logs/``, ``checkpoints/``,
        ``metrics.json``, ``pictures/`` and ``model/``.

    Raises:
        ValueError: for an unknown model, for faulty data, or if folder or checkpoint are of another run, or the
            folder is another process's; in training, for numbers that are not finite, or for images that cannot be
            read any more.
        FileNotFoundError: if ``config.resume`` names a checkpoint that does not exist.
        pcenet.runtime.launcher.OtherProcessError: if another process that trains with this one has an error.
        pcenet.runtime.launcher.LostProcessError: if another one has ended.
        KeyboardInterrupt: after Ctrl-C; a checkpoint holds the state after the step that was at work, unless there was
            a second Ctrl-C. ``pcenet.runtime.signals.Terminated``, a kind of it: after SIGTERM.
    """
    if config.dry_run or config.find != "none":
        raise ValueError("dry_run and find leave no run: see pcenet.training.rehearsal and pcenet.training.find")
    set_threads(config.threads)
    check_logging(config)
    ranks = ranks_of_environment()
    device = resolve_device(config.device, ranks.local_count)
    config = resolve(config, device)
    folder = RunFolder(config.folder)
    with ExitStack() as stack:
        stop = stack.enter_context(listening(SAME_SIGNAL if ranks.count > 1 else 0.0, quiet=not ranks.first))
        stack.enter_context(data.naming_dead_workers())
        stack.enter_context(together(ranks, device, config.process_timeout))
        if not ranks.first:
            stack.enter_context(silent())
        begun, finished, checkpoints = decide(lambda: enter(folder, config, stack))
        if finished:
            say(f"{folder.path} is finished; nothing to do")
            return folder
        with agreeing():
            run = prepare(config, folder, device, checkpoints, batches)
        announce(run)
        if batches is None and (hint := few_steps(run)):
            say(hint)
        decide(lambda: begin(run, begun, stack))
        fitted = fit(run, stop)
        finish(run, fitted)
        if batches is None:
            command = "explain" if run.cost["router_multiply_adds"] else "eval"
            say(f"next: pcenet {command} {shlex.quote(str(folder.path))}")
    return folder


def enter(folder: RunFolder, config: TrainConfig, stack: ExitStack) -> tuple[bool, bool, list[Path]]:
    """Whether a run has begun in a folder, which is then held until the stack is left; whether it is finished; and the
    checkpoints of which it goes on from the first that is intact."""
    begun = folder.config.is_file()
    if begun:
        stack.enter_context(folder.held())
    checkpoints = folder.enter(config)
    return begun, folder.finished, checkpoints


def begin(run: Run, begun: bool, stack: ExitStack) -> None:
    """Make the run folder, and hold it until the stack is left."""
    folder, config = run.folder, run.config
    if not begun:
        folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(folder.held())
        folder.enter(config)  # another process may have begun here meanwhile
    processes = {"workers": run.workers, "processes": run.ranks.count}
    folder.create(config, environment(run.device, config.precision) | processes, run.checkpoint)


@contextmanager
def silent() -> Iterator[None]:
    """For all processes but the first: nothing is printed, and no warnings are given."""
    logger = logging.getLogger("pcenet")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


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
    task = get_task(config.task)
    sources: dict[data.Split, Any] = {
        "train": task.open(config, config.data, "train"),
        "val": task.open(config, config.data, "val"),
    }
    classes = sources["train"].classes
    check_classes(classes, sources["val"].classes, "train", "val")
    known = fingerprint(sources)
    for finding in data.quick_check(sources):
        log.warning("%s: %s", config.data, finding.message)
    sources = choose_images(sources, config, batches)
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(config, len(classes), start=not checkpoints)
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
        start_at(loaders["train"], position)
    return Run(config, task, folder, device, ranks, workers, sources, model, cost, loaders, checkpoint, position, known)


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


def start_at(loader: DataLoader[Any], position: Position) -> None:
    """Let a training loader start at a position; Lightning says the epoch only after the workers have begun."""
    assert isinstance(loader.sampler, data.EpochSampler)
    assert loader.batch_size is not None
    loader.sampler.start_at(position.epoch, position.batch * loader.batch_size)


def steps_per_epoch(run: Run) -> int:
    """Steps of the optimiser in one pass over the training images."""
    return math.ceil(len(run.loaders["train"]) / run.config.accumulate)


def few_steps(run: Run) -> str | None:
    """A hint for a run that begins with hardly any steps in an epoch, and could have more; else None."""
    config, images, steps = run.config, len(run.sources["train"]), steps_per_epoch(run)
    if run.checkpoint or config.overfit is not None or steps >= FEW_STEPS:
        return None
    most = images // (ENOUGH_STEPS * config.devices * config.accumulate)
    batch_size = 1 << max(most, 1).bit_length() - 1  # the largest power of two of so many images
    if batch_size >= (config.batch_size or 0):
        return None
    return (
        f"only {steps} step{'s' * (steps > 1)} in an epoch: {images} training images in batches of"
        f" {config.batch_size}; --batch-size {batch_size} makes more"
    )


@dataclass(frozen=True)
class Fitted:
    """What training left beside its checkpoints.

    Attributes:
        history: the figures of each epoch.
        stopped: the option that ended training early, if any did.
    """

    history: History
    stopped: str | None


def fit(run: Run, stop: Stop) -> Fitted:
    """Train with Lightning; the averaged weights end up in the last checkpoint."""
    config, folder = run.config, run.folder
    steps = steps_per_epoch(run)
    history = History(folder.logs / "metrics.csv", (len(run.sources["train"]), len(run.sources["val"])))
    about = {
        "config": asdict(config),
        "classes": list(run.sources["train"].classes),
        "data": run.fingerprint,
    }
    checkpoints = Checkpoints(folder, about, config.checkpoint_minutes, stop)
    callbacks = stopping_callbacks(config, f"val/{run.task.objective.score}")
    finite = FiniteSteps(config.skip_nonfinite)
    callbacks += [finite, Averaging(config.ema_decay, finite), ExpertBiases(partial(bias_images, run))]
    callbacks += [Throughput(), EpochFigures()]
    callbacks += [RouterHealth(), history, checkpoints]
    schedules = Schedules(config, steps)
    if schedules.of_the_routers:
        callbacks.append(RouterSchedules(schedules))
    terminal = sys.stdout.isatty()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        loggers = stack.enter_context(run_loggers(config, folder, run.position.step)) if run.ranks.first else []
        trainer = L.Trainer(
            **trainer_options(run),
            max_epochs=config.epochs,
            callbacks=[*callbacks, TrainingBar()] if terminal else callbacks,
            enable_progress_bar=terminal,
            logger=loggers or False,
            log_every_n_steps=min(LOG_EVERY, steps),
            plugins=[CheckpointFiles()],
            default_root_dir=folder.path,
        )
        if run.ranks.count > 1:
            synchronised(run.model, config, run.device)
        module = make_module(run)
        with interruptible(trainer, stop):
            trainer.fit(module, run.loaders["train"], run.loaders["val"], ckpt_path=run.checkpoint, weights_only=True)
        return Fitted(history, stopped_by(trainer, schedules.total_steps))


def make_module(run: Run) -> TrainingModule:
    """What trains a run's network."""
    objective = run.task.make_objective(run.model, run.config, run.sources["train"])
    return TrainingModule(run.model, objective, run.config, steps_per_epoch(run))


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


def trainer_options(run: Run) -> dict[str, Any]:
    """What Lightning's trainer is told of how to compute, whatever it does."""
    return {
        "accelerator": run.device.type,
        **strategy_options(run.config, run.ranks),
        "precision": "bf16-mixed" if run.config.precision == "bf16" else "32-true",
        "accumulate_grad_batches": run.config.accumulate,
        "gradient_clip_val": run.config.clip_grad or None,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


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
            # What it is to be replaced by is not in torch 2.6.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # The gradients of 1x1 convolutions have either layout, which are the same.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def interruptible(trainer: L.Trainer, stop: Stop) -> Iterator[None]:
    """Turn Lightning's exit 1 after an interruption back into what it was; give the signals their handlers back."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        stop.patient = False
        stop.listen()


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
    if run.device.type == "cpu" and cost["router_multiply_adds"] and (reason := ops.why_reference()):
        lines.append(f"PCE layers run on the reference, about {REFERENCE_COST:g} times slower than kernels; {reason}")
    if config.init and not run.checkpoint:
        lines.append(f"starting from the weights of {config.init}")
    if isinstance(run.model, TimmNet) and run.model.upcycling:
        lines += str(run.model.upcycling).split("\n")
    if config.devices > 1:
        kind = "parts of the network in each" if config.strategy == "fsdp" else "the network in each"
        lines[2] += f"; {config.devices} processes, {kind}, {images_per_step(config)} images in a step of all"
    if run.checkpoint:
        position = run.position
        batch = f", batch {position.batch}" if position.batch else ""
        where = f"after epoch {position.epoch}{batch}" if position.epoch else f"after batch {position.batch}"
        lines.append(f"continuing from {run.checkpoint} {where}")
        if position.changed:
            lines.append(f"changed since then: {', '.join(position.changed)}")
    say(*lines)


def finish(run: Run, fitted: Fitted) -> None:
    """Write ``model/`` from the last checkpoint's averaged weights, measure and draw it, write ``metrics.json``."""
    config, source = run.config, run.sources["val"]
    model = run.model
    if config.strategy == "fsdp":  # each process has parts of that one
        model = build_model(config, len(source.classes))
        run.task.tell_of_data(model, source, config.grey_range)
    decide(lambda: keep_averaged(model, run.folder))
    share(list(model.state_dict().values()))
    result = run.task.evaluate(model, run.loaders["val"], source.classes, device=run.device, precision=config.precision)
    decide(lambda: report(run, fitted, result))


def keep_averaged(model: SavableModel, folder: RunFolder) -> None:
    """Give a network the averaged weights of the last checkpoint, and write it."""
    averaged = read_checkpoint(folder.steps[-1])["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in averaged.items()})
    write_atomically(folder.model, model.save_pretrained)


def report(run: Run, fitted: Fitted, result: Any) -> None:
    """Write and show what was measured."""
    config, folder = run.config, run.folder
    draw(run, fitted.history.rows, result)
    metrics = summary(run, fitted, result)
    write_json(folder.metrics, metrics)
    if fitted.stopped:
        say(f"stopped by {fitted.stopped} in epoch {len(fitted.history.rows)} of {config.epochs}")
    say(f"validation {run.task.headline(result)}")
    if result.router:
        console().print(router_table(result.router))
        console().print(training_table(metrics[TRAINED]))
    say(f"model: {folder.model}")
    if found := complaint(result.router):
        log.warning("%s", found)


def draw(run: Run, rows: Sequence[Mapping[str, float]], result: Any) -> None:
    """Write ``pictures/``, or say why not."""
    objective = run.task.objective
    with drawing(run.folder.pictures):
        pictures = pictures_of(
            rows, result.confusion, list(result.per_class), (f"train/{objective.train_score}", f"val/{objective.score}")
        )
        write_atomically(run.folder.pictures, partial(save_pictures, pictures))


def summary(run: Run, fitted: Fitted, result: Any) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    score, rows = run.task.objective.score, fitted.history.rows
    best = max(rows, key=lambda row: row[f"val/{score}"])
    return {
        "task": run.config.task,
        "model": run.config.model,
        "data": run.config.data,
        "seed": run.config.seed,
        "epochs": len(rows),
        "steps": int(rows[-1]["step"]),
        "stopped": fitted.stopped,
        "val": run.task.summary(result),
        "best": {"epoch": int(best["epoch"]), score: best[f"val/{score}"]},
        "epoch_seconds": statistics.median(row["train/epoch_seconds"] for row in rows),
        "images_per_second": statistics.median(row["train/images_per_second"] for row in rows),
        "complexity": run.cost,
        EVALUATED: result.router,
        TRAINED: training_of(rows[-1]),
    }
