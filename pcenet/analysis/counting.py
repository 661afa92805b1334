"""Counting which expert gets what: layer by layer, streamed over a data set; only counts are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pcenet.analysis.observing import Seen, observe
from pcenet.analysis.specialisation import Counts
from pcenet.data import IGNORE
from pcenet.nn import Routing


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
            classes: ``[N]`` int64, the class of each patch; patches of ``pcenet.data.IGNORE`` are not counted.
        """
        grid, num_experts = routing.grid, routing.num_experts
        cells = grid.rows * grid.columns
        position = torch.arange(grid.patches) % cells
        expert, classes = routing.expert_ids[:, 0].cpu(), classes.cpu()
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
    mask: Tensor, grid: tuple[int, int], patch_size: int, map_size: tuple[int, int], num_classes: int
) -> Tensor:
    """The class of most of each patch's pixels, ``[rows * columns]`` int64; of equally many the first,
    ``pcenet.data.IGNORE`` where no pixel counts.

    Args:
        mask: ``[H, W]`` int64 of a whole image, of whatever size; a mask's pixel belongs to the patch in which its
            centre lies.
        grid: rows and columns of the image's patches.
        patch_size: S.
        map_size: height and width of the map that was cut into patches.
        num_classes: values of the mask that count.
    """
    row, column = (
        ((torch.arange(length) + 0.5) * (size / length / patch_size)).long()
        for length, size in zip(mask.shape, map_size, strict=True)
    )
    patch = row[:, None] * grid[1] + column
    counted = mask != IGNORE
    index = patch[counted] * num_classes + mask[counted]
    votes = torch.bincount(index, minlength=grid[0] * grid[1] * num_classes).view(-1, num_classes)
    return torch.where(votes.sum(1) > 0, votes.argmax(1), IGNORE)


@torch.inference_mode()
def count_experts(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | Sequence[Tensor]]], num_classes: int
) -> dict[str, PatchCounts]:
    """Counts of every PCE layer of a network over a data set.

    Args:
        model: the network, on the device of the images; it is put into evaluation mode.
        batches: images ``[B, 3, H, W]`` with their classes ``[B]``, which each patch of an image then has, or with
            masks ``[h, w]`` of the whole images, B of them.
        num_classes: C.

    Returns:
        Layer name to its counts.
    """
    model.eval()
    counts: dict[str, PatchCounts] = {}
    for images, targets in batches:
        with observe(model) as layers:
            model(images.to(memory_format=torch.channels_last))
        for name, seen in layers.items():
            classes = classes_of(seen, targets, num_classes)
            counts.setdefault(name, PatchCounts(num_classes)).update(seen.routing, classes)
    return counts


def classes_of(seen: Seen, targets: Tensor | Sequence[Tensor], num_classes: int) -> Tensor:
    """The class of each of a layer's patches, ``[N]`` int64: its image's, or that of most of its pixels in a mask.

    Args:
        seen: what the layer saw.
        targets: classes ``[B]`` of the images, or masks ``[h, w]`` of the whole images, B of them.
        num_classes: values of a mask that count.
    """
    _, rows, columns = seen.routing.grid
    if isinstance(targets, Tensor) and targets.ndim == 1:
        return targets.repeat_interleave(rows * columns)
    grid = (rows, columns)
    return torch.cat([patch_classes(m.cpu(), grid, seen.patch_size, seen.map_size, num_classes) for m in targets])
