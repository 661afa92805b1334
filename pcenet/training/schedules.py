"""What changes while a run goes on, as pure functions of the optimiser step (0 is the first)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pcenet.nn import Router
from pcenet.runs.config import Schedule, TrainConfig

POLY_POWER = 0.9  # DeepLab's (Chen et al., 2017)


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule = "cosine") -> float:
    """Share of the peak learning rate at ``step``: a linear rise, then the schedule.

    Step ``warmup_steps - 1`` is the first at the peak; under ``"cosine"`` and ``"poly"`` step ``total_steps`` would be
    the first at zero.

    Args:
        step: optimiser steps taken.
        total_steps: steps of the whole run.
        warmup_steps: steps of the rise.
        schedule: ``"cosine"``: half a wave down to zero; ``"poly"``: ``(1 - progress) ** 0.9``, the custom in
            segmentation; ``"constant"``: the peak to the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    if schedule == "poly":
        return float((1 - progress) ** POLY_POWER)
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """``start`` at step 0, then in a straight line to ``end`` at step ``steps``, and ``end`` from there on."""
    if step >= steps:
        return end
    return start + (end - start) * step / steps


@dataclass(frozen=True)
class Schedules:
    """The schedules of one run.

    Attributes:
        config: the options.
        steps_per_epoch: optimiser steps in one pass over the training images.
    """

    config: TrainConfig
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def of_the_routers(self) -> dict[str, Callable[[int], float]]:
        """Those concerning the routers that change anything, by name; empty by default."""
        config = self.config
        return {
            name: value
            for name, value, changes in (
                ("temperature", self.temperature, config.temperature != 1),
                ("router_noise", self.router_noise, config.router_noise > 0),
                ("balance_weight", self.balance, config.balance_start is not None),
            )
            if changes
        }

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate."""
        return learning_rate_factor(
            step,
            total_steps=self.total_steps,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            schedule=self.config.schedule,
        )

    def temperature(self, step: int) -> float:
        """The routers' temperature: it falls to 1."""
        return self._linear(step, self.config.temperature, 1.0, self.config.temperature_epochs)

    def balance(self, step: int) -> float:
        """Weight of the load-balance loss: constant, or from ``balance_start`` to ``balance``."""
        end, start = self.config.balance, self.config.balance_start
        return end if start is None else self._linear(step, start, end, self.config.balance_epochs)

    def router_noise(self, step: int) -> float:
        """Standard deviation of the noise on the routers' logits: it falls to 0."""
        return self._linear(step, self.config.router_noise, 0.0, self.config.router_noise_epochs)

    def _linear(self, step: int, start: float, end: float, epochs: float | None) -> float:
        epochs = self.config.epochs / 2 if epochs is None else epochs
        return linear(step, start=start, end=end, steps=round(epochs * self.steps_per_epoch))


def set_routers(model: nn.Module, temperature: float = 1.0, noise: float = 0.0) -> None:
    """Give every router of a network this temperature and, for training, noise of this standard deviation."""
    for router in model.modules():
        if isinstance(router, Router):
            router.temperature = temperature
            router.perturb = partial(add_noise, deviation=noise) if noise else None


def add_noise(logits: Tensor, deviation: float) -> Tensor:
    """Logits plus Gaussian noise from torch's default generator, which the training step seeds."""
    return logits + deviation * torch.randn_like(logits)
