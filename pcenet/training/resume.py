"""Continuing from a checkpoint: whether it belongs to the run that is asked for, and where in it that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pcenet.models.hub import check_tensors
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.config import TrainConfig
from pcenet.training.evaluate import check_classes
from pcenet.training.folder import ELSEWHERE, RunFolder, check_same, differences, saved_config

MODEL = "model."  # how the names of the network's tensors begin in a checkpoint
AFRESH = "start afresh without --resume"

Fingerprint = dict[str, list[Any]]


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


def fingerprint(sources: Mapping[Any, Any]) -> Fingerprint:
    """The number of images of each split and a digest of their names and labels: by these, data are known again."""
    found: Fingerprint = {}
    for split, source in sources.items():
        labels = getattr(source, "labels", None)
        names = hashlib.blake2b(digest_size=16)
        for index in range(len(source)):
            label = "" if labels is None else int(labels[index])
            names.update(f"{source.file_name(index)}\0{label}\0".encode(errors="surrogateescape"))
        found[split] = [len(source), names.hexdigest()]
    return found


def check_data_same(saved: Fingerprint, found: Fingerprint, where: str, name: str) -> None:
    """Raise a ``ValueError`` that says how the data differ from those that a run has seen, if they do."""
    for split, (count, names) in found.items():
        before, known = saved.get(split, [0, ""])
        if before != count:
            difference = f"{split} had {before} images and has {count}"
        elif names != known:
            difference = f"{split} has as many images, but not the same file names or labels"
        else:
            continue
        raise ValueError(f"resume: the data of {where} have changed: {name}: {difference}; put them back, or {AFRESH}")


def position_of(
    checkpoint: Path, folder: RunFolder, config: TrainConfig, classes: Sequence[str], data: Fingerprint
) -> Position:
    """Where a run with these options may continue from a checkpoint in ``folder``.

    Args:
        checkpoint: its path.
        folder: where the run goes on; only there may its own newest checkpoint be one that needs no more training.
        config: the options, resolved.
        classes: class names of the data.
        data: their `fingerprint`.

    Raises:
        ValueError: if the checkpoint is damaged, or of a run with other options, classes or data, or if it has all its
            epochs behind it; names the difference.
    """
    content = read_checkpoint(checkpoint)
    run = content["run"]
    saved = saved_config(run["config"], str(checkpoint))
    check_same(saved, config, str(checkpoint), f"give the same ones, or {AFRESH}")
    check_classes(run["classes"], classes, str(checkpoint), config.data)
    check_data_same(run["data"], data, str(checkpoint), config.data)
    done = len(content["callbacks"]["History"]["rows"])
    own = checkpoint.parent.resolve() == folder.checkpoints.resolve()
    if (stopped := run.get("stopped")) and not own:
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
    return Position(done, run["batches"], content["global_step"], tuple(differences(saved, config, ELSEWHERE)))


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Raise a ``ValueError`` naming the first tensor of a checkpoint that does not fit the network, and its shapes."""
    content = read_checkpoint(checkpoint)
    for key in ("state_dict", "current_model_state"):  # averaged weights, and where there are such, those of now
        tensors = {
            name.removeprefix(MODEL): tensor for name, tensor in content.get(key, {}).items() if name.startswith(MODEL)
        }
        if key in content:
            check_tensors(tensors, model, f"resume: {checkpoint} does not fit", AFRESH)
