"""Labels for a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pcenet.analysis import expert_map
from pcenet.inference.batches import Batch
from pcenet.inference.outputs import Row
from pcenet.nn import Routing, record_routing
from pcenet.training.config import Precision
from pcenet.training.device import autocast

Records = dict[str, list[Routing]]
Grids = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Classifier:
    """A network with what is needed to apply it.

    Attributes:
        model: images ``[B, 3, H, W]`` to logits ``[B, len(classes)]``, in evaluation mode.
        classes: class names, by class number.
        top: how many classes to list for an image, at most.
        routing: whether to list the expert of each patch.
        device: where to compute, and where the model is.
        precision: ``"bf16"`` or ``"fp32"``.
    """

    model: nn.Module
    classes: Sequence[str]
    top: int
    routing: bool
    device: torch.device
    precision: Precision

    @property
    def columns(self) -> list[str]:
        """``file, label, probability``, then ``label_2, probability_2`` and so on."""
        further = range(2, min(self.top, len(self.classes)) + 1)
        return ["file", "label", "probability", *(f"{kind}_{i}" for i in further for kind in ("label", "probability"))]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Row]:
        """A row per file of the batch."""
        images = batch.images.to(self.device, memory_format=torch.channels_last)
        recorder: AbstractContextManager[Records] = record_routing(self.model) if self.routing else nullcontext({})
        with autocast(self.precision, self.device), recorder as records:
            logits = self.model(images)
        best = logits.float().softmax(1).topk(min(self.top, len(self.classes)))
        grids = expert_grids(records, len(batch.files)) if self.routing else [None] * len(batch.files)
        return [
            self._row(file.file, *values)
            for file, *values in zip(batch.files, best.values.tolist(), best.indices.tolist(), grids, strict=True)
        ]

    def _row(self, file: str, probabilities: list[float], numbers: list[int], grids: Grids | None) -> Row:
        top = [(self.classes[number], value) for number, value in zip(numbers, probabilities, strict=True)]
        record: dict[str, Any] = {
            "file": file,
            "label": top[0][0],
            "probability": top[0][1],
            "top": [{"label": label, "probability": value} for label, value in top],
        }
        if grids is not None:
            record["routing"] = grids
        return Row([file, *(cell for pair in top for cell in pair)], record)


def expert_grids(records: Records, images: int) -> list[Grids]:
    """For each image, by layer name, the expert of each patch (its first choice) as rows of columns; -1: dropped."""
    maps = {name: expert_map(routings[-1]).tolist() for name, routings in records.items()}
    return [{name: layer[image] for name, layer in maps.items()} for image in range(images)]
