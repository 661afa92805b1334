"""The callback that turns the routers' knobs while they train."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from pcenet.nn import Router
from pcenet.training.schedules import Schedules


def add_noise(logits: Tensor, deviation: float) -> Tensor:
    """Logits plus Gaussian noise from torch's default generator, which the training step seeds."""
    return logits + deviation * torch.randn_like(logits)


class RouterSchedules(Callback):
    """Sets temperature and noise of every router before each batch, and logs what changes.

    Validation sees the routers as the finished network has them: at temperature 1 and without noise.

    Args:
        schedules: the run's.
    """

    def __init__(self, schedules: Schedules) -> None:
        self.schedules = schedules

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        set_routers(pl_module, self.schedules.temperature(step), self.schedules.router_noise(step))
        values = {f"train/{name}": value(step) for name, value in self.schedules.of_the_routers.items()}
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        set_routers(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        set_routers(pl_module)


def set_routers(module: torch.nn.Module, temperature: float = 1.0, noise: float = 0.0) -> None:
    """Give every router in ``module`` this temperature and, for training, noise of this standard deviation."""
    for router in module.modules():
        if isinstance(router, Router):
            router.temperature = temperature
            router.perturb = partial(add_noise, deviation=noise) if noise else None
