"""Coordinates and their Fourier features (design, section 1; Tancik et al., 2020, "Fourier Features Let Networks Learn
High Frequency Functions in Low Dimensional Domains"). Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcenet.nn.constants import constant


def centre_coordinates(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Centres of n equal cells of the interval (-1, 1): ``u_i = (2i + 1)/n - 1``, shape ``[n]``.

    The end points themselves never occur: their features would coincide.
    """
    return (2 * torch.arange(n, dtype=dtype, device=device) + 1) / n - 1


def fourier_features(coordinates: Tensor, num_bands: int) -> Tensor:
    """Fourier features of coordinates in [-1, 1].

    Args:
        coordinates: any shape ``[...]``, floating point.
        num_bands: number K of frequency bands; 0 gives an empty last axis.

    Returns:
        ``[..., 2K]``: ``sin(2^k pi u), cos(2^k pi u)`` for k = 0..K-1, the pair of a band side by side.
    """
    octaves = 2.0 ** torch.arange(num_bands, dtype=coordinates.dtype, device=coordinates.device)
    angles = coordinates.unsqueeze(-1) * (math.pi * octaves)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


@constant
def axis_features(
    cells: int,
    patch_size: int,
    num_bands: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of both kinds of position along one axis of a map of ``cells`` patches.

    Returns:
        Two tensors of shape ``[cells * patch_size, 2K]``, one row per pixel of the axis: the features of its patch's
        absolute position in the image, and those of its own relative position inside the patch.
    """
    absolute = fourier_features(centre_coordinates(cells, dtype=dtype, device=device), num_bands)
    relative = fourier_features(centre_coordinates(patch_size, dtype=dtype, device=device), num_bands)
    return absolute.repeat_interleave(patch_size, dim=0), relative.repeat(cells, 1)


def position_map(
    rows: int,
    columns: int,
    patch_size: int,
    num_bands: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Position features of every pixel of a map of rows x columns patches.

    Returns:
        ``[1, 8K, rows * patch_size, columns * patch_size]``; the channels are, 2K each: absolute row, absolute column,
        relative row, relative column.
    """
    absolute_row, relative_row = axis_features(rows, patch_size, num_bands, dtype=dtype, device=device)
    absolute_column, relative_column = axis_features(columns, patch_size, num_bands, dtype=dtype, device=device)
    height, width = rows * patch_size, columns * patch_size
    parts = (
        absolute_row[:, None].expand(-1, width, -1),
        absolute_column[None].expand(height, -1, -1),
        relative_row[:, None].expand(-1, width, -1),
        relative_column[None].expand(height, -1, -1),
    )
    return torch.cat(parts, dim=-1).permute(2, 0, 1).unsqueeze(0)
