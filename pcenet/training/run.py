"""One training run from its options to its model: the order in which everything happens."""

from __future__ import annotations

import io
import logging
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

import pcenet.data as data
from pcenet import ops
from pcenet.models import SavableModel, TimmNet
from pcenet.ops.library import REFERENCE_COST
from pcenet.reporting.plots import drawing, pictures_of, png_of
from pcenet.reporting.tables import console, router_table, training_table
from pcenet.runs.config import TrainConfig
from pcenet.runs.fingerprint import fingerprint
from pcenet.runs.folder import RunFolder, images_per_step
from pcenet.runs.health import EVALUATED, TRAINED, complaint, training_of
from pcenet.runs.records import fingerprint_of
from pcenet.runtime.device import environment, resolve_device, set_threads
from pcenet.runtime.distributed import agreeing, decide, share, together
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.runtime.signals import Stop, listening
from pcenet.texts import say
from pcenet.training.checkpoints import DamagedError, read_checkpoint
from pcenet.training.figures import Row
from pcenet.training.loop import Trainer
from pcenet.training.network import build_model
from pcenet.training.preparation import Run, open_sources, prepare, resolve, steps_per_epoch
from pcenet.training.progress import RunBar
from pcenet.training.resume import check_data_same
from pcenet.training.sheets import prediction_sheet, training_sheet
from pcenet.training.trackers import Trackers, check_tracker, tracking
from pcenet.writing import write_atomically, write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_STEPS = 3  # in an epoch; below it there is a hint, to make at least so many:
ENOUGH_STEPS = 5
SAME_SIGNAL = 1.0  # seconds in which a batch system and torchrun, or our launcher, may send a process the same one

log = logging.getLogger(__name__)


def train(config: TrainConfig, batches: int | None = None) -> RunFolder:
    """``pcenet train``: train a network and leave the run folder; one of several processes does its part of it.

    On the CPU two runs with the same options leave the same ``model/``, bit for bit, on one kind of processor
    and with the same versions, operators (``PCENET_OPS``) and number of threads. On a GPU they do not: some of its
    kernels add in any order.

    Args:
        config: the options.
        batches: train and validate on this many batches only, to try everything out; None: on all.

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
    check_tracker(config)
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
            decide(lambda: check_data_of_finished(folder, config))
            say(f"{folder.path} is finished; nothing to do")
            return folder
        with agreeing():
            run = prepare(config, folder, device, checkpoints, batches)
        announce(run)
        if batches is None and (hint := few_steps(run)):
            say(hint)
        decide(lambda: begin(run, begun, stack))
        first_step = run.position.step + 1
        trackers = stack.enter_context(tracking(config, folder, first_step)) if ranks.first else Trackers({})
        if ranks.first and not run.checkpoint:
            draw(run, trackers, 0, lambda: {"training": training_sheet(run)}.items())
        rows, stopped = fit(run, stop, trackers)
        finish(run, rows, stopped, trackers)
        if batches is None:
            command = "explain" if run.cost["router_multiply_adds"] else "eval"
            say(f"next: pcenet {command} {shlex.quote(str(folder.path))}")
    return folder


def check_data_of_finished(folder: RunFolder, config: TrainConfig) -> None:
    """Raise a ``ValueError`` that says how the data have changed since a run was finished, if that can be told."""
    saved = fingerprint_of(folder.metrics)
    try:
        found = fingerprint(open_sources(config)) if saved else {}
    except (ValueError, OSError):  # of data that are no longer here
        return
    check_data_same(saved, found, str(folder.path), config.data)


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


def fit(run: Run, stop: Stop, trackers: Trackers) -> tuple[list[Row], str | None]:
    """Train; the averaged weights end up in the last checkpoint.

    Returns:
        The figures of each epoch, and the option that ended training early, if any did.
    """
    config = run.config
    with ExitStack() as stack:
        stack.enter_context(quiet())
        bar = stack.enter_context(RunBar(config.epochs, shown=run.ranks.first and sys.stdout.isatty()))
        state = Trainer(run, stop, trackers, bar).fit()
        return state.rows, state.stopped


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Fabric's notes, and warnings that concern nobody."""
    logger = logging.getLogger("lightning.fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # What it is to be replaced by is not in torch 2.6.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # The gradients of 1x1 convolutions have either layout, which are the same.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            yield
    finally:
        logger.setLevel(level)


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
    if ops.backend("cpu") == "reference" and run.device.type == "cpu" and cost["router_multiply_adds"]:
        reason = ops.why_reference()
        lines.append(f"PCE layers run on the reference, about {REFERENCE_COST:g} times slower than kernels; {reason}")
    if run.device.type != "cpu" and cost["router_multiply_adds"]:
        lines.append(f"PCE layers run on: {ops.backend(run.device.type)}")
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


def finish(run: Run, rows: Sequence[Row], stopped: str | None, trackers: Trackers) -> None:
    """Write ``model/`` from averaged weights, measure and draw it, write ``metrics.json``."""
    config, source = run.config, run.sources["val"]
    model = run.model
    if config.strategy == "fsdp":  # each process has parts of that one
        model = build_model(config, source.classes)
        run.task.tell_of_data(model, source, config.grey_range)
    epoch = decide(lambda: keep_averaged(run, model, rows, stopped))
    share(list(model.state_dict().values()))
    result = run.task.evaluate(model, run.loaders["val"], source.classes, device=run.device, precision=config.precision)
    decide(lambda: report(run, model, rows, stopped, epoch, result, trackers))


def keep_averaged(run: Run, model: SavableModel, rows: Sequence[Row], stopped: str | None) -> int:
    """Load averaged weights into a network and save it: the best epoch's after early stopping, else the last one's.

    Returns:
        The epoch whose weights they are.
    """
    folder, row = run.folder, rows[-1]
    newest = chosen = folder.steps[-1]
    if stopped == "early_stopping":
        row = best_row(run, rows)
        chosen = folder.checkpoint(int(row["step"]))
    try:
        content = read_checkpoint(chosen)
    except DamagedError as error:
        if chosen == newest:
            raise
        # Damaged, or in the folder in which the run began.
        log.warning("%s; keeping the last epoch's weights instead of the best epoch's", error)
        content, row = read_checkpoint(newest), rows[-1]
    model.load_state_dict(content["averaged"])
    write_atomically(folder.model, model.save_pretrained)
    return int(row["epoch"])


def report(
    run: Run,
    model: SavableModel,
    rows: Sequence[Row],
    stopped: str | None,
    epoch: int,
    result: Any,
    trackers: Trackers,
) -> None:
    """Write and show what was measured of the weights of an epoch."""
    config, folder = run.config, run.folder
    draw(run, trackers, int(rows[-1]["step"]), lambda: final_pictures(run, model, rows, result))
    metrics = summary(run, rows, stopped, result) | {"weights_of_epoch": epoch}
    write_json(folder.metrics, metrics)
    if stopped:
        kept = "" if epoch == len(rows) else f"; the weights are those of epoch {epoch}"
        say(f"stopped by {stopped} in epoch {len(rows)} of {config.epochs}{kept}")
    say(f"validation {run.task.headline(result)}")
    if result.router:
        console().print(router_table(result.router))
        console().print(training_table(metrics[TRAINED]))
    say(f"model: {folder.model}")
    if found := complaint(result.router):
        log.warning("%s", found)


def draw(run: Run, trackers: Trackers, step: int, figures: Callable[[], Iterable[tuple[str, Figure]]]) -> None:
    """Write figures by their names into ``pictures/`` and show them to the trackers, one by one, or say why not."""
    folder = run.folder.pictures
    with drawing(folder):
        for name, figure in figures():
            content = png_of(figure)
            folder.mkdir(exist_ok=True)
            write_bytes(folder / f"{name}.png", content)
            trackers.show(folder / f"{name}.png", step)


def final_pictures(run: Run, model: SavableModel, rows: Sequence[Row], result: Any) -> Iterator[tuple[str, Figure]]:
    """What is drawn of a run at its end."""
    objective = run.task.objective
    scores = (f"train/{objective.train_score}", f"val/{objective.score}")
    yield from pictures_of(rows, result.confusion, list(result.per_class), scores).items()
    yield "predictions", prediction_sheet(run, model)


def best_row(run: Run, rows: Sequence[Row]) -> Row:
    """The figures of the epoch with the best validation score, the first of several."""
    return max(rows, key=lambda row: row[f"val/{run.task.objective.score}"])


def summary(run: Run, rows: Sequence[Row], stopped: str | None, result: Any) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    score, best = run.task.objective.score, best_row(run, rows)
    return {
        "task": run.config.task,
        "model": run.config.model,
        "data": run.config.data,
        "fingerprint": run.fingerprint,
        "seed": run.config.seed,
        "epochs": len(rows),
        "steps": int(rows[-1]["step"]),
        "stopped": stopped,
        "val": run.task.summary(result),
        "best": {"epoch": int(best["epoch"]), score: best[f"val/{score}"]},
        "epoch_seconds": statistics.median(row["train/epoch_seconds"] for row in rows),
        "images_per_second": statistics.median(row["train/images_per_second"] for row in rows),
        "complexity": run.cost,
        EVALUATED: result.router,
        TRAINED: training_of(rows[-1]),
    }
