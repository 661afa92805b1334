"""The health of a router in numbers, accumulated over batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pcenet.nn.routing import Routing


@dataclass(frozen=True)
class RoutingSummary:
    """Router health of one layer.

    Attributes:
        load: each expert's share of the choices, before dropping; sums to 1.
        entropy: of the load, divided by ln E: 1 where all experts are chosen equally often, 0 where one is always.
        max_min: largest load over the smallest; infinite if an expert was never chosen.
        drop_rate: share of the choices that were dropped.
        dead: experts that were never chosen.
    """

    load: tuple[float, ...]
    entropy: float
    max_min: float
    drop_rate: float
    dead: tuple[int, ...]


class RoutingStatistics:
    """Streams Routings of one layer into a `RoutingSummary`; only counts are kept, and they stay on the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._load: Tensor | None = None
        self._kept: Tensor | None = None

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Add the counts of one Routing."""
        kept = routing.dispatch_mask.sum()
        load = routing.expert_counts
        self._load = load if self._load is None else self._load.to(kept.device) + load
        self._kept = kept if self._kept is None else self._kept.to(kept.device) + kept

    def state_dict(self) -> dict[str, Tensor | None]:
        """The counts, by which another object can go on."""
        return {"load": self._load, "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Go on from what `state_dict` gave."""
        self._load, self._kept = state["load"], state["kept"]

    def compute(self) -> RoutingSummary:
        """The summary of everything seen so far.

        Raises:
            ValueError: if nothing was.
        """
        if self._load is None or self._kept is None:
            raise ValueError("no routing was recorded: call update first")
        counts: list[int] = self._load.tolist()
        total = sum(counts)
        load = tuple(count / total for count in counts)
        entropy = sum(share * math.log(1 / share) for share in load if share)
        return RoutingSummary(
            load=load,
            entropy=entropy / math.log(len(load)) if len(load) > 1 else 1.0,
            max_min=max(load) / min(load) if min(load) else math.inf,
            drop_rate=1 - int(self._kept) / total,
            dead=tuple(e for e, count in enumerate(counts) if count == 0),
        )
