"""How sharply a router decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pcenet.nn import Routing


@dataclass(frozen=True)
class Sharpness:
    """Means over patches.

    Attributes:
        gate: probability of the best expert; 1/E where the router cannot tell, 1 where it is sure.
        margin: by how much that is above the second best; 0 where it cannot tell.
        entropy: of a patch's probabilities, divided by ln E: 1 where it cannot tell, 0 where it is sure.
    """

    gate: float
    margin: float
    entropy: float


class SharpnessStatistics:
    """Streams Routings of one layer into a `Sharpness`; only sums are kept."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._patches = 0

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Add the patches of one Routing."""
        probs = routing.probs.double()
        gate, second = _two_best(probs)
        scale = math.log(routing.num_experts) or 1.0
        entropy = -torch.special.xlogy(probs, probs).sum(1) / scale
        self._sums += torch.stack((gate.sum(), (gate - second).sum(), entropy.sum())).cpu()
        self._patches += len(probs)

    def compute(self) -> Sharpness:
        """The means over everything seen so far.

        Raises:
            ValueError: if nothing was.
        """
        if not self._patches:
            raise ValueError("no routing was recorded: call update first")
        return Sharpness(*(self._sums / self._patches).tolist())


def _two_best(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest probabilities of each patch; 0 for the second of a single expert."""
    best = torch.nn.functional.pad(probs, (0, 1)).topk(2, dim=1).values
    return best[:, 0], best[:, 1]
