"""Feature map <-> patches.

Axes: B images, C channels, H x W the map, h x w its grid of patches, S the patch side, N = B*h*w patches. Patches are
numbered row by row within an image, image by image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn.checks import check_at_least, check_not_traced
from pcenet.nn.fourier import position_map


class Grid(NamedTuple):
    """How the patches of a batch lie: ``batch`` images of ``rows`` x ``columns`` patches each."""

    batch: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """N, the number of patches in the batch."""
        return self.batch * self.rows * self.columns


def grid_of(x: Tensor, patch_size: int) -> Grid:
    """The grid of patches that covers the map x ``[B, C, H, W]``; the last row and column may be partly padding."""
    batch, _, height, width = x.shape
    return Grid(batch, -(-height // patch_size), -(-width // patch_size))


def check_map(x: Tensor, channels: int) -> None:
    """Raise a ``ValueError`` unless x is a map ``[B, channels, H, W]`` that a layer can work on."""
    check_not_traced(x)
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"x of shape {tuple(x.shape)} must be a map [B, {channels}, H, W] with no empty axis")


def check_grid(x: Tensor, patch_size: int, grid: Grid) -> None:
    """Raise a ``ValueError`` unless the map x ``[B, C, H, W]`` has the grid that a routing was made for."""
    found = grid_of(x, patch_size)
    if found != grid:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has the patches {found}, and its routing is for {grid}: both must be of maps "
            "of one size, as many images, and one patch_size"
        )


class PatchExtractor(nn.Module):
    """Cut a map into patches and append Fourier features of position as channels.

    Two kinds of position are encoded: the absolute one of the patch in the image and the relative one of each pixel in
    its patch, two axes each, ``num_bands`` pairs of sine and cosine. The module has no parameters.

    Args:
        patch_size: S, patch side and stride in pixels of the map.
        num_bands: K; 0 appends nothing.

    Raises:
        ValueError: if ``patch_size`` is not positive or ``num_bands`` is negative.
    """

    def __init__(self, patch_size: int, num_bands: int = 4) -> None:
        super().__init__()
        check_at_least(1, patch_size=patch_size)
        check_at_least(0, num_bands=num_bands)
        self.patch_size = patch_size
        self.num_bands = num_bands

    def split(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Content alone: a map ``[B, C, H, W]`` to patches ``[N, C, S, S]``, zeros where they stick out, channels-last,
        and their grid."""
        side, grid = self.patch_size, grid_of(x, self.patch_size)
        below = grid.rows * side - x.shape[2]
        right = grid.columns * side - x.shape[3]
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        cells = x.permute(0, 2, 3, 1).unflatten(2, (grid.columns, side)).unflatten(1, (grid.rows, side))
        pixels_last = cells.transpose(2, 3).reshape(grid.patches, side, side, x.shape[1])
        return pixels_last.permute(0, 3, 1, 2), grid

    def merge(self, patches: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """The inverse of `split`: patches ``[N, C, S, S]`` to the map ``[B, C, H, W]`` of ``size`` = (H, W)."""
        _, channels, side, _ = patches.shape
        batch, rows, columns = grid
        cells = patches.permute(0, 2, 3, 1).reshape(batch, rows, columns, side, side, channels)
        pixels_last = cells.transpose(2, 3).reshape(batch, rows * side, columns * side, channels)
        return pixels_last.permute(0, 3, 1, 2)[:, :, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Enriched patches ``[B*P, C + 8K, S, S]`` of a map ``[B, C, H, W]``."""
        patches, grid = self.split(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        positions = position_map(
            grid.rows, grid.columns, self.patch_size, self.num_bands, dtype=precise, device=x.device
        )
        position_patches, _ = self.split(positions.to(x.dtype))
        return torch.cat((patches, position_patches.repeat(grid.batch, 1, 1, 1)), dim=1)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return f"patch_size={self.patch_size}, num_bands={self.num_bands}"
