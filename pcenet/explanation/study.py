"""One pass over the data: all that is counted of every PCE layer. Nothing else of the data is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pcenet.analysis import (
    AgreementStatistics,
    Gallery,
    PatchCounts,
    Seen,
    SharpnessStatistics,
    observe,
)
from pcenet.analysis.agreement import VIEWS, Pixels, first_choices
from pcenet.analysis.counting import classes_of
from pcenet.analysis.effects import Tally, Targets, joined, tally
from pcenet.nn import RoutingStatistics

EXHIBITS = 12  # of an expert's gallery

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class LayerStudy:
    """What is counted of one layer.

    Attributes:
        first: what the layer saw in the first batch; its grid and sizes are those that are shown.
        num_classes: K.
        health: load and dropping.
        sharpness: how sure the router is.
        by_class: patches by position, expert and class; those of no class are left out.
        by_place: patches by position and expert, all of them.
        agreement: by the name of the view, the agreement with the images as they are.
        gallery: each expert's surest patches.
    """

    first: Seen
    num_classes: int
    health: RoutingStatistics = field(default_factory=RoutingStatistics)
    sharpness: SharpnessStatistics = field(default_factory=SharpnessStatistics)
    agreement: dict[str, AgreementStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_class = PatchCounts(self.num_classes)
        self.by_place = PatchCounts(1)
        self.gallery = Gallery(self.num_experts, EXHIBITS)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.first.routing.num_experts

    def update(self, seen: Seen, pixels: Tensor, targets: Targets, start: int) -> None:
        """Add a batch as it is.

        Args:
            seen: what the layer saw.
            pixels: the images, ``[B, 3, H, W]``, from 0 to 1.
            targets: classes of the images, or masks.
            start: number of the batch's first image.
        """
        self.health.update(seen.routing)
        self.sharpness.update(seen.routing)
        self.by_class.update(seen.routing, classes_of(seen, targets, self.num_classes))
        self.by_place.update(seen.routing, torch.zeros(seen.routing.grid.patches, dtype=torch.long))
        self.gallery.update(seen, pixels, start)

    def compare(self, view: str, first: Tensor | None, second: Tensor | None) -> None:
        """Add a batch's experts, and those of a view of it, where patches have a place in both."""
        if first is not None and second is not None:
            self.agreement.setdefault(view, AgreementStatistics(self.num_experts)).update(first, second)


@dataclass(frozen=True)
class Study:
    """What one pass gave.

    Attributes:
        layers: by name, in the order in which they run.
        tally: the network's score, as counts.
        images: how many images were seen.
    """

    layers: Mapping[str, LayerStudy]
    tally: Tally
    images: int


@torch.inference_mode()
def study(
    model: nn.Module, batches: Iterable[tuple[Tensor, Targets]], num_classes: int, pixels: Pixels, forward: Forward
) -> Study:
    """Run a network over a data set, once as it is and once for each of `VIEWS`.

    Args:
        model: the network, in evaluation mode.
        batches: images ``[B, 3, H, W]`` with their classes ``[B]``, or with B masks.
        num_classes: K.
        pixels: between the network's inputs and what they show.
        forward: network and images to logits.
    """
    layers: dict[str, LayerStudy] = {}
    tallies: list[Tally] = []
    images = 0
    for inputs, targets in batches:
        with observe(model) as found:
            logits = forward(model, inputs)
        tallies.append(tally(logits, targets, num_classes))
        shown = pixels.of(inputs)
        as_it_is = {name: first_choices(seen) for name, seen in found.items()}
        for name, seen in found.items():
            layer = layers.setdefault(name, LayerStudy(seen, num_classes))
            layer.update(seen, shown, targets, images)
        for view in VIEWS:
            with observe(model) as changed:
                forward(model, pixels.inputs(view.change(shown)))
            for name, seen in changed.items():
                layers[name].compare(view.name, as_it_is[name], first_choices(seen, view))
        images += len(inputs)
    return Study(layers, joined(tallies), images)
