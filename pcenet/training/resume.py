"""Continuing from a checkpoint: whether it belongs to the run that is asked for, and where in it that goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from pcenet.runs.config import TrainConfig
from pcenet.runs.fingerprint import Fingerprint, difference
from pcenet.runs.folder import ELSEWHERE, RunFolder, check_same, differences, saved_config
from pcenet.tasks import get_task
from pcenet.tasks.classes import check_same_classes
from pcenet.training.checkpoint_schema import fault_for
from pcenet.training.checkpoints import DamagedError, read_checkpoint
from pcenet.training.optimizer import make_optimizer

T = TypeVar("T")
AFRESH = "start afresh without --resume"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a run goes on.

    Attributes:
        epoch: whole epochs behind it.
        batch: batches of the next epoch behind it.
        step: steps of the optimiser behind it.
        changed: the options that differ from those of before, where that is safe.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    changed: tuple[str, ...] = ()


def check_data_same(saved: Fingerprint, found: Fingerprint, where: str, name: str) -> None:
    """Raise a ``ValueError`` that says how the data differ from those that a run has seen, if they do."""
    if changed := difference(saved, found):
        way_out = "put them back, or start afresh in another folder, with --out"
        raise ValueError(f"resume: the data of {where} have changed: {name}: {changed}; {way_out}")


def first_intact(candidates: Sequence[Path], config: TrainConfig, judge: Callable[[Path], T]) -> tuple[Path, T]:
    """The first checkpoint that is not damaged, and what ``judge`` says of it. Those before it are named in warnings.

    Args:
        candidates: paths, at least one, as `RunFolder.enter` gives them.
        config: the options of the run.
        judge: raises a `DamagedError` for one that cannot be used.

    Raises:
        ValueError: if all are damaged; and what ``judge`` raises of one that is intact, but of another run.
    """
    faults = []
    for path in candidates:
        try:
            found = judge(path)
        except DamagedError as error:
            faults.append(str(error))
        else:
            for fault in faults:
                log.warning("%s; going on from %s", fault, path)
            return path, found
    if config.resume != "auto":
        raise ValueError(f"resume: {faults[0]}; give the path of an intact checkpoint, or auto")
    raise ValueError(
        f"resume: no checkpoint is intact: {'; '.join(faults)}; start afresh in another folder with --out, or in this"
        f" one when {candidates[0].parent} is removed"
    )


def position_of(
    checkpoint: Path,
    folder: RunFolder,
    config: TrainConfig,
    classes: Sequence[str],
    data: Fingerprint,
    model: nn.Module,
    batches: int,
) -> Position:
    """Where a run with these options may continue from a checkpoint in ``folder``.

    Args:
        checkpoint: its path.
        folder: where the run goes on; only there may its own newest checkpoint be one that needs no more training.
        config: the options, resolved.
        classes: class names of the data.
        data: their `fingerprint`.
        model: the network.
        batches: of an epoch.

    Raises:
        DamagedError: if the checkpoint is damaged, or what is in it does not fit the run that it says it is of.
        ValueError: if it is of a run with other options, classes or data, or if it has all its epochs behind it; names
            the difference.
    """
    content = read_checkpoint(checkpoint)
    run = content["run"]
    try:
        saved = saved_config(run["config"], str(checkpoint))
    except ValueError as error:
        raise DamagedError(str(error)) from error
    check_same(saved, config, str(checkpoint), f"give the same ones, or {AFRESH}")
    check_same_classes(run["classes"], classes, str(checkpoint), config.data)
    check_data_same(run["data"], data, str(checkpoint), config.data)
    score = get_task(config.task).objective.score
    optimizer = make_optimizer(model, config)
    if fault := fault_for(content, model, optimizer, config.epochs, batches, config.accumulate, score):
        raise DamagedError(f"{checkpoint} is damaged or of another version of pcenet: {fault}")
    done = len(content["rows"])
    own = checkpoint.parent.resolve() == folder.checkpoints.resolve()
    if (stopped := content["stopped"]) and not own:
        raise ValueError(
            f"resume: {checkpoint} was stopped by {stopped} in epoch {done}, where its run ends; its own run folder"
            " holds the model (or completes it with --resume auto); to train for longer, start afresh with another"
            f" {stopped}"
        )
    if done >= config.epochs and not own:
        raise ValueError(
            f"resume: {checkpoint} has {done} of {config.epochs} epochs behind it, nothing is left to train; its own"
            " run folder holds the model (or completes it with --resume auto); to train for longer, start afresh"
            f" with --epochs above {config.epochs} and without --resume"
        )
    return Position(done, content["batch"], content["step"], tuple(differences(saved, config, ELSEWHERE)))
