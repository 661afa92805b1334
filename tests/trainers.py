"""Trainers of a network alone, without data and folders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pcenet.runs.config import TrainConfig
from pcenet.runtime.launcher import Ranks
from pcenet.runtime.signals import Stop
from pcenet.tasks.classification import ClassificationObjective
from pcenet.training.loop import Trainer
from pcenet.training.progress import RunBar
from pcenet.training.trackers import Trackers


def classifying(model: nn.Module, config: TrainConfig, num_classes: int = 3) -> Trainer:
    """What trains a classifier with these options, one step in an epoch, on the processor."""
    objective = ClassificationObjective(config, num_classes)
    run: Any = SimpleNamespace(
        config=config,
        model=model,
        task=SimpleNamespace(make_objective=lambda *_: objective),
        device=torch.device("cpu"),
        ranks=Ranks(),
        sources={"train": None},
        loaders={"train": range(1)},
        checkpoint=None,
    )
    return Trainer(run, Stop(), Trackers({}), RunBar(1, shown=False))
