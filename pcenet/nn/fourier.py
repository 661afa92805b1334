"""Coordinates and their Fourier features (Tancik et al., 2020, "Fourier Features Let Networks Learn
High Frequency Functions in Low Dimensional Domains"). Pure functions."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pcenet.ops.compiled import observed


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


def position_lines(
    height: int,
    width: int,
    patch_size: int,
    num_bands: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Position features of the pixels of a map of height x width, cut into patches: those of a pixel are the sum of a
    line for its row and one for its column.

    Returns:
        ``[height, 8K]`` and ``[width, 8K]``, shared by all who ask: nobody may write to them. The channels are, 2K
        each: absolute row, absolute column, relative row, relative column; a line has zeros for the other axis.
    """
    arguments = (height, width, patch_size, num_bands, dtype, device)
    return _make_lines(*arguments) if observed() else _kept_lines(*arguments)


def position_map(
    rows: int,
    columns: int,
    patch_size: int,
    num_bands: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Position features of every pixel of a map of rows x columns patches, ``[1, 8K, rows * patch_size, columns *
    patch_size]``; the channels are those of `position_lines`."""
    size = (rows * patch_size, columns * patch_size)
    own_row, own_column = position_lines(*size, patch_size, num_bands, dtype=dtype, device=device)
    return (own_row[:, None] + own_column).permute(2, 0, 1)[None]


def _make_lines(
    height: int, width: int, patch_size: int, num_bands: int, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    relative = fourier_features(centre_coordinates(patch_size, dtype=dtype, device=device), num_bands)
    nothing = relative.new_zeros(1, 2 * num_bands)
    lines = []
    for axis, size in enumerate((height, width)):
        cells = -(-size // patch_size)
        absolute = fourier_features(centre_coordinates(cells, dtype=dtype, device=device), num_bands)
        parts = []
        for own in (absolute.repeat_interleave(patch_size, dim=0)[:size], relative.repeat(cells, 1)[:size]):
            other = nothing.expand(size, -1)
            parts += [other, own] if axis else [own, other]
        lines.append(torch.cat(parts, dim=1))
    return lines[0], lines[1]


@lru_cache(maxsize=64)
def _kept_lines(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Made once: for a single image that takes longer than the router. A tensor that is born in inference mode could
    # never take part in training.
    with torch.inference_mode(False), torch.no_grad():
        return _make_lines(*arguments)
