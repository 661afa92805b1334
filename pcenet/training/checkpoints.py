"""Checkpoints: whole or not there, and never believed unless they are intact.

A checkpoint is a folder, ``checkpoints/step-00000120``, with ``state.ckpt`` (tensors and plain values) and a manifest
(see `pcenet.runs.manifest`). It is written under a temporary name, flushed to the disk, and then given its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pcenet.runs.folder import RunFolder
from pcenet.runs.manifest import STATE, fault_of, seal
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.training.checkpoint_schema import fault_in
from pcenet.writing import discard, replacing

KEPT = 2  # newest checkpoints that are kept, beside that of the best epoch


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint. ``path`` is complete or absent at any moment; one of that name is replaced.

    Raises:
        OSError: naming what could not be written, such as on a full disk; nothing is left of it.
    """
    with replacing(path) as folder:
        folder.mkdir()
        with open(folder / STATE, "wb") as file:
            torch.save(dict(content), file)
        seal(folder)


class DamagedError(ValueError):
    """A checkpoint is not intact; says which, and what is wrong."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain values are accepted, never code.

    Raises:
        DamagedError: if it is not intact, or no checkpoint of a training run.
        ValueError: for one that an earlier version has written.
    """
    if fault := fault_of(path):
        raise DamagedError(f"{path} {fault}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch warns of a pickle that it would not have written
            content = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none of torch's can make it raise whatever there is
        if ran_out_of_memory(error):
            raise
        kind = type(error).__name__
        raise DamagedError(f"{path} is damaged or no checkpoint of pcenet train ({kind})") from error
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        raise ValueError(
            f"resume: {path} is of an earlier version of pcenet; finish its run with that version, or start afresh in"
            " another folder with --out"
        )
    if fault := fault_in(content):
        raise DamagedError(f"{path} is damaged or no checkpoint of pcenet train: {fault}")
    return dict(content)


def remove_old(folder: RunFolder, best_step: int) -> None:
    """Keep the newest two checkpoints and that of the epoch with the best validation score."""
    for path in folder.steps[:-KEPT]:
        if path != folder.checkpoint(best_step):
            discard(path)
