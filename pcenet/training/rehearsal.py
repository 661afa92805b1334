"""``pcenet train --dry-run``: everything that a run does, with two batches, leaving nothing."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.device import resolve_device
from pcenet.runtime.distributed import decide, together
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.texts import say
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.preparation import resolve
from pcenet.training.resume import first_intact
from pcenet.training.run import train

BATCHES = 2


def dry_run(config: TrainConfig) -> None:
    """Train and validate on two batches of images in a folder that is removed, and say that it works.

    Weights & Biases is left out, and so are the limits of epochs and time.

    Args:
        config: the options of the run to come.

    Raises:
        ValueError: for whatever the run itself would refuse, its run folder included.
        FileNotFoundError: if ``config.resume`` names a checkpoint that does not exist.
    """
    config, ranks = replace(config, dry_run=False), ranks_of_environment()
    device = resolve_device(config.device, ranks.local_count)
    with together(ranks, device, config.process_timeout), ExitStack() as stack:
        decide(lambda: check_folder(resolve(config, device)))
        folder = decide(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="pcenet-")))
        out = str(Path(folder) / "run")
        train(
            replace(config, out=out, resume=None, epochs=1, early_stopping=None, max_time=None, log="tensorboard"),
            batches=BATCHES,
        )
    if ranks.first:
        say(f"dry run: everything works, and nothing of it is left; the run itself would be {config.folder}")


def check_folder(config: TrainConfig) -> None:
    """Raise what entering the run folder would raise, and what its checkpoints would where they are damaged."""
    checkpoints = RunFolder(config.folder).enter(config)
    if checkpoints:
        first_intact(checkpoints, config, read_checkpoint)
