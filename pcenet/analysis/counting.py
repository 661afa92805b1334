"""Counting which expert gets what: layer by layer, streamed over a data set; only counts are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcenet.analysis.specialisation import Counts
from pcenet.data import IGNORE
from pcenet.nn import PCELayer, Routing


class PatchCounts:
    """Counts ``[P, E, C]`` of one layer: patches by position (row by row), expert (first choice) and class.

    Where images differ in size, so do the grids of patches; each gets counts of its own, see `by_grid`.

    Args:
        num_classes: C.

    Attributes:
        by_grid: (rows, columns) of the patches to the counts.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.by_grid: dict[tuple[int, int], Counts] = {}

    def update(self, routing: Routing, classes: Tensor) -> None:
        """Add one batch.

        Args:
            routing: of N patches.
            classes: ``[N]`` int64, the class of each patch; patches of `pcenet.data.IGNORE` are not counted.
        """
        grid, num_experts = routing.grid, routing.num_experts
        cells = grid.rows * grid.columns
        position = torch.arange(grid.patches) % cells
        expert, classes = routing.choice[:, 0].cpu(), classes.cpu()
        index = (position * num_experts + expert) * self.num_classes + classes
        shape = (cells, num_experts, self.num_classes)
        counted = torch.bincount(index[classes != IGNORE], minlength=int(np.prod(shape))).view(shape).numpy()
        key = (grid.rows, grid.columns)
        self.by_grid[key] = self.by_grid[key] + counted if key in self.by_grid else counted

    def compute(self) -> Counts:
        """All counts, the positions of different grids one after the other.

        Raises:
            ValueError: if there are none.
        """
        if not self.by_grid:
            raise ValueError("no patch was counted: call update first")
        return np.concatenate(list(self.by_grid.values()))


def patch_classes(
    masks: Tensor, routing: Routing, patch_size: int, map_size: tuple[int, int], num_classes: int
) -> Tensor:
    """The class of most of each patch's pixels, ``[N]`` int64; of equally many the first, `IGNORE` where none counts.

    Args:
        masks: ``[B, H, W]`` int64 of whole images, of whatever size; a mask's pixel belongs to the patch in which its
            centre lies.
        routing: of the images' patches.
        patch_size: S.
        map_size: height and width of the map that was cut into patches.
        num_classes: values of the mask that count.
    """
    grid = routing.grid
    row, column = (
        ((torch.arange(length) + 0.5) * (size / length / patch_size)).long()
        for length, size in zip(masks.shape[1:], map_size, strict=True)
    )
    image = torch.arange(grid.batch)[:, None, None] * (grid.rows * grid.columns)
    patch = image + row[:, None] * grid.columns + column
    counted = masks != IGNORE
    index = patch[counted] * num_classes + masks[counted]
    votes = torch.bincount(index, minlength=grid.patches * num_classes).view(grid.patches, num_classes)
    return torch.where(votes.sum(1) > 0, votes.argmax(1), IGNORE)


@torch.inference_mode()
def count_experts(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> dict[str, PatchCounts]:
    """Counts of every PCE layer of a network over a data set.

    Args:
        model: the network, on the device of the images; it is put into evaluation mode.
        batches: images ``[B, 3, H, W]`` with their classes ``[B]``, which each patch of an image then has, or with
            masks ``[B, h, w]`` of the whole images.
        num_classes: C.

    Returns:
        Layer name to its counts.
    """
    model.eval()
    counts: dict[str, PatchCounts] = {}
    for images, targets in batches:
        with _routings_and_maps(model) as seen:
            model(images.to(memory_format=torch.channels_last))
        for name, (routing, patch_size, map_size) in seen.items():
            if targets.ndim == 1:
                grid = routing.grid
                classes = targets.cpu().repeat_interleave(grid.rows * grid.columns)
            else:
                classes = patch_classes(targets.cpu(), routing, patch_size, map_size, num_classes)
            counts.setdefault(name, PatchCounts(num_classes)).update(routing, classes)
    return counts


@contextmanager
def _routings_and_maps(model: nn.Module) -> Iterator[dict[str, tuple[Routing, int, tuple[int, int]]]]:
    """Layer name to routing, patch size and size of the map, which a `Routing` does not know, of the last pass."""
    seen: dict[str, tuple[Routing, int, tuple[int, int]]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, PCELayer):

                def collect(router: nn.Module, args: Any, routing: Routing, name: str = name) -> None:
                    height, width = args[0].shape[2:]
                    seen[name] = (routing, int(router.patch_size), (height, width))  # type: ignore[arg-type]

                stack.callback(module.router.register_forward_hook(collect).remove)
        yield seen
