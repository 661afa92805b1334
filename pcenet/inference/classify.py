"""A label for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pcenet.inference.batches import Batch
from pcenet.inference.network import Grids, Network
from pcenet.inference.outputs import Row
from pcenet.reporting.numbers import percent


@dataclass(frozen=True)
class Classifier:
    """Labels images.

    Attributes:
        network: gives logits ``[B, len(network.classes)]``.
        top: how many classes to list for an image, at most.
    """

    network: Network
    top: int

    headings = ("file", "label", "probability")

    @property
    def columns(self) -> list[str]:
        """``file, label, probability``, then ``label_2, probability_2`` and so on."""
        further = range(2, self._listed + 1)
        return ["file", "label", "probability", *(f"{kind}_{i}" for i in further for kind in ("label", "probability"))]

    @property
    def _listed(self) -> int:
        return min(self.top, len(self.network.classes))

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Row]:
        """A row per file of the batch."""
        logits, grids = self.network(batch.images)
        best = logits.softmax(1).topk(self._listed)
        return [
            self._row(file.file, *values)
            for file, *values in zip(batch.files, best.values.tolist(), best.indices.tolist(), grids, strict=True)
        ]

    def _row(self, file: str, probabilities: list[float], numbers: list[int], grids: Grids) -> Row:
        top = [(self.network.classes[number], value) for number, value in zip(numbers, probabilities, strict=True)]
        label, probability = top[0]
        record: dict[str, Any] = {
            "file": file,
            "label": label,
            "probability": probability,
            "top": [{"label": label, "probability": value} for label, value in top],
        }
        return Row(
            [file, *(cell for pair in top for cell in pair)], record | grids, [file, label, percent(probability)]
        )
