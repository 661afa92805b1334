"""Everything that a run goes on from after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from pcenet.training.engine import part_of, whole
from pcenet.training.figures import EpochFigures, Row

FORMAT = 4  # of checkpoints
NUMBERS = ("step", "batch", "skipped", "images", "seconds", "elapsed", "stopped", "rows")


@dataclass
class State:
    """What changes while a run goes on; what is not here does not outlive an interruption.

    Attributes:
        model: the network.
        averaged: the moving average of its weights, which is validated and kept.
        optimizer: of the network's parameters.
        scaler: of the loss, where its gradients are in float16.
        step: steps of the optimiser that are done, those that were left out included.
        batch: batches of the current epoch that are done.
        skipped: consecutive steps that were left out, up to now.
        images: images of the current epoch that this process has trained on.
        seconds: of training in the current epoch, loading included.
        elapsed: seconds of the whole run, validation included.
        stopped: the option that has ended training early, if any has.
        rows: the figures of each epoch.
        figures: those of the current epoch.
    """

    model: nn.Module
    averaged: AveragedModel
    optimizer: AdamW
    scaler: GradScaler
    step: int = 0
    batch: int = 0
    skipped: int = 0
    images: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    stopped: str | None = None
    rows: list[Row] = field(default_factory=list)
    figures: EpochFigures = field(default_factory=EpochFigures)

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything as a checkpoint keeps it, weights whole. All processes take part; the first has it."""
        return {
            "format": FORMAT,
            "model": whole(self.model.state_dict()),
            "averaged": whole(self.averaged.module.state_dict()),
            "averages": int(self.averaged.n_averaged),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "figures": self.figures.state_dict(),
            **{name: getattr(self, name) for name in NUMBERS},
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on from there, all but the weights: those are loaded before they are divided (`load_weights`)."""
        for name in NUMBERS:
            setattr(self, name, content[name])
        self.averaged.n_averaged.fill_(content["averages"])
        if content["scaler"]:  # another precision has none
            self.scaler.load_state_dict(content["scaler"])
        self.figures.load_state_dict(content["figures"])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parts = {
            index: {name: part_of(value, parameters[index]) for name, value in values.items()}
            for index, values in content["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**content["optimizer"], "state": parts})


def load_weights(content: Mapping[str, Any], model: nn.Module, averaged: AveragedModel) -> None:
    """Put a checkpoint's weights into a network and its average."""
    model.load_state_dict(content["model"])
    averaged.module.load_state_dict(content["averaged"])
