"""Means over an epoch that survive an interruption within it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcenet.nn.processes import process_count, sum_over_processes
from pcenet.runtime.distributed import exchange_device, gather


class EpochMeans:
    """Means of figures, weighted by the number of images; sums stay on the device, and checkpoints keep them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def update(self, values: Mapping[str, Tensor], images: int) -> None:
        """Add the figures of one batch, scalars without gradient, each the mean over its images."""
        for name, value in values.items():
            self.sums[name] = value * images + (self.sums[name].to(value.device) if name in self.sums else 0)
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        """The means so far, over all processes; empty where none has seen images."""
        if process_count() == 1:
            return {name: value / self.images for name, value in self.sums.items()}
        names = max(gather(list(self.sums)), key=len)  # one of them may have seen none
        none = torch.zeros((), dtype=torch.float64, device=exchange_device())
        own = torch.stack([*(self.sums.get(name, none).double() for name in names), none + self.images])
        *sums, images = sum_over_processes(own).unbind()
        return {name: (value / images).float() for name, value in zip(names, sums, strict=True)}

    def add(self, state: Mapping[str, Any]) -> None:
        """Add the images of another object's `state_dict`."""
        for name, value in state["sums"].items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.images += state["images"]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a checkpoint keeps it."""
        return {"sums": dict(self.sums), "images": self.images}
