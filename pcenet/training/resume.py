"""Continuing from a checkpoint: what it holds, and whether it belongs to the run that is asked for."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcenet.models.hub import check_tensors
from pcenet.training.config import TrainConfig
from pcenet.training.evaluate import check_classes
from pcenet.training.folder import RunFolder, check_same, saved_config

MODEL = "model."  # how the names of the network's tensors begin in a checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain values are accepted, never code.

    Raises:
        ValueError: if the file is not a checkpoint of a training run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["callbacks"]["History"]["rows"], content["run"]["config"], content["run"]["classes"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of pcenet train ({type(error).__name__})") from error
    return dict(content)


def epochs_behind(checkpoint: Path, folder: RunFolder, config: TrainConfig, classes: Sequence[str]) -> int:
    """Whole epochs behind a checkpoint from which a run with these options may continue in ``folder``.

    Args:
        checkpoint: its path.
        folder: where the run goes on; only there may its own last checkpoint be one that needs no more training.
        config: the options, resolved.
        classes: class names of the data.

    Raises:
        ValueError: if the checkpoint is damaged, or of a run with other options or classes, or if it has all its
            epochs behind it; names the difference.
    """
    content = read_checkpoint(checkpoint)
    saved = saved_config(content["run"]["config"], str(checkpoint))
    check_same(saved, config, str(checkpoint), "give the same ones, or start afresh without --resume")
    check_classes(content["run"]["classes"], classes, str(checkpoint), config.data)
    done = len(content["callbacks"]["History"]["rows"])
    if (stopped := content["run"].get("stopped")) and checkpoint != folder.last:
        raise ValueError(
            f"resume: {checkpoint} was stopped by {stopped} in epoch {done}, where its run ends; its own run folder"
            " holds the model (or completes it with --resume auto); to train for longer, start afresh with another"
            f" {stopped}"
        )
    if done >= config.epochs and checkpoint != folder.last:
        raise ValueError(
            f"resume: {checkpoint} has {done} of {config.epochs} epochs behind it, nothing is left to train; its own"
            " run folder holds the model (or completes it with --resume auto); to train for longer, start afresh"
            f" with --epochs above {config.epochs} and without --resume"
        )
    return done


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Raise a ``ValueError`` naming the first tensor of a checkpoint that does not fit the network, and its shapes."""
    content = read_checkpoint(checkpoint)
    for key in ("state_dict", "current_model_state"):  # averaged weights, and where there are such, those of now
        tensors = {
            name.removeprefix(MODEL): tensor for name, tensor in content.get(key, {}).items() if name.startswith(MODEL)
        }
        if key in content:
            check_tensors(tensors, model, f"resume: {checkpoint} does not fit", "start afresh without --resume")
