"""Which pixels the convolutions of patches read: maps as rows, and indices of rows.

A batch of maps ``[B, C, H, W]`` is handled as rows of C numbers, one per pixel, ``[B*H*W, C]``: in channels-last memory
that is a view, and a patch with its surroundings is a gather of whole rows. A row of zeros at the end stands for every
pixel beyond the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pcenet.nn.constants import constant
from pcenet.nn.patches import Grid, split_map


class Windows(NamedTuple):
    """The rows of a batch of maps that patches read.

    Attributes:
        pixels: ``[P, cells]`` int64, for each patch of the first image; ``beyond`` for a cell beyond the map.
        pixels_per_image: H * W.
        beyond: B * H * W, the number of the row of zeros.
    """

    pixels: Tensor
    pixels_per_image: int
    beyond: int

    def rows(self, patch: Tensor) -> Tensor:
        """The rows that patches ``[n]`` read, ``[n, cells]``; for a patch of number N, which there is not, zeros."""
        image = patch // len(self.pixels)
        rows = self.pixels.index_select(0, patch - image * len(self.pixels))
        return rows.add_((image * self.pixels_per_image)[:, None]).clamp_max_(self.beyond)


@constant
def make_windows(
    grid: Grid,
    size: tuple[int, int],
    patch_size: int,
    *,
    spots: int = 1,
    taps: int,
    margin: int = 0,
    device: torch.device,
) -> Windows:
    """Windows whose cells are row ``r * S + spot + tap - m`` and column ``c * S + spot + tap - m`` of the
    map for patch (r, c), in the order row spot, column spot, row tap, column tap.

    Args:
        grid: how the patches lie.
        size: H and W.
        patch_size: S.
        spots: number of spots on each axis.
        taps: number of taps on each axis.
        margin: m.
        device: where the indices are needed.
    """
    height, width = size
    beyond = grid.batch * height * width
    cell = torch.arange(spots, device=device)[:, None] + torch.arange(-margin, taps - margin, device=device)

    def axis(patches: int) -> Tensor:
        return torch.arange(0, patches * patch_size, patch_size, device=device)[:, None, None] + cell

    rows = axis(grid.rows)[:, None, :, None, :, None]
    columns = axis(grid.columns)[None, :, None, :, None, :]
    on_map = ((rows >= 0) & (rows < height)) & ((columns >= 0) & (columns < width))
    pixels = torch.where(on_map, rows * width + columns, beyond)
    return Windows(pixels.flatten(2).flatten(0, 1), height * width, beyond)


def map_to_rows(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B*H*W, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def append_zeros(rows: Tensor) -> Tensor:
    """Rows ``[R, C]`` and a row of zeros after them."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1])))


def real_cells(x: Tensor, patch_size: int) -> Tensor | None:
    """``[N, 1, S, S]`` bool, which cells of each patch of a map ``[B, C, H, W]`` lie on it; None if all do."""
    batch, _, height, width = x.shape
    if height % patch_size == 0 and width % patch_size == 0:
        return None
    cells, _ = split_map(x.new_ones((1, 1, height, width), dtype=torch.bool), patch_size)
    return cells.repeat(batch, 1, 1, 1)
