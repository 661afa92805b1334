"""Ending a run before its last epoch: without progress, or without time."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from typing_extensions import override

from pcenet.runs.config import TrainConfig
from pcenet.runs.rules import duration


class NoProgress(EarlyStopping):
    """Lightning's EarlyStopping on the validation score; what it stopped stays stopped when the run is resumed."""

    option = "early_stopping"

    @property
    def over(self) -> bool:
        """Whether it says stop."""
        return self.wait_count >= self.patience

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.over


class TimeLimit(Timer):
    """Lightning's Timer, which counts the time of training over interruptions."""

    option = "max_time"

    @property
    def over(self) -> bool:
        """Whether it says stop."""
        remaining = self.time_remaining()
        return remaining is not None and remaining <= 0


def stopping_callbacks(config: TrainConfig, score: str) -> list[Callback]:
    """What may end a run early, as the options say.

    Args:
        config: the options.
        score: name under which validation logs the figure of merit; higher is better.
    """
    callbacks: list[Callback] = []
    if config.early_stopping is not None:
        callbacks.append(NoProgress(score, patience=config.early_stopping, mode="max"))
    if config.max_time is not None:
        callbacks.append(TimeLimit(duration(config.max_time), verbose=False))
    return callbacks


def stopped_by(trainer: L.Trainer, total_steps: int) -> str | None:
    """The option that ended training before its last step; None where nothing did.

    Args:
        trainer: after an epoch, or after training.
        total_steps: steps of the optimiser in the whole run.
    """
    if trainer.global_step >= total_steps or not trainer.should_stop:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stoppers = [callback for callback in callbacks if isinstance(callback, NoProgress | TimeLimit)]
    return next((callback.option for callback in stoppers if callback.over), None)
