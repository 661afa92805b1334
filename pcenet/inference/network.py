"""A trained network, ready to be applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcenet.analysis import expert_map
from pcenet.choices import Precision
from pcenet.exporting.files import ExportedNet
from pcenet.models import SavableModel
from pcenet.nn import Routing
from pcenet.runtime.device import autocast
from pcenet.tasks.answers import answer

Records = dict[str, list[Routing]]
Grids = dict[str, Any]
"""``{"routing": {layer: rows of columns}}`` of one image, or nothing."""


@dataclass(frozen=True)
class Network:
    """A network with what is needed to apply it.

    Attributes:
        model: in evaluation mode.
        classes: class names, by class number.
        routing: whether to note the expert of each patch.
        device: where to compute, and where the model is.
        precision: a resolved one.
        tta: whether to average the answers with those to the mirror images, see `answer`.
    """

    model: SavableModel | ExportedNet
    classes: Sequence[str]
    routing: bool
    device: torch.device
    precision: Precision
    tta: bool = False

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Grids]]:
        """Logits of a batch, float32, and for each image the entries that `routing` adds to its record.

        Raises:
            ValueError: if the logits are not finite, so that they say nothing, or not as many as classes.
        """
        weight = next(self.model.parameters(), images)
        images = images.to(self.device, weight.dtype, memory_format=torch.channels_last)
        # What a file holds is exported for float32.
        cast = weight.dtype == torch.float32 and not isinstance(self.model, ExportedNet)
        with autocast(self.precision if cast else "fp32", self.device):
            logits, records = answer(self.model, images, tta=self.tta)
        if logits.shape[1] != len(self.classes):
            raise ValueError(
                f"run: the network gives {logits.shape[1]} logits and knows {len(self.classes)} classes; call "
                "reset_classifier to change their number, and set class_names"
            )
        if not logits.isfinite().all():
            raise ValueError("run: the network's outputs are not finite numbers; its training diverged, train it anew")
        if not self.routing:
            return logits, [{} for _ in images]
        return logits, [{"routing": grid} for grid in expert_grids(records, len(images))]


def expert_grids(records: Records, images: int) -> list[dict[str, list[list[int]]]]:
    """For each image, by layer name, the expert of each patch (its first choice) as rows of columns; -1: dropped."""
    maps = {name: expert_map(routings[-1]).tolist() for name, routings in records.items()}
    return [{name: layer[image] for name, layer in maps.items()} for image in range(images)]
