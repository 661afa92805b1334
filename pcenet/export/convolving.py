"""Convolutions by experts in a network that no longer learns. Each expert reads its own patches' pixels and nothing else,
in operators that exporters know: gathers and matrix products, which run at full speed everywhere.

A patch is cut into tiles: of one pixel, whose convolution is a matrix product of what it reads, or, where 4 divides the
patch, of 4x4, by Winograd's algorithm, at a quarter of the products. Pixels of a map are rows of C numbers. Axes as in
`pcenet.export.routing`; K cells that a tile reads, Z rows, D channels out. Tiles lie sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.export.routing import Choice
from pcenet.nn.experts import NORM_EPS, StackedNorm
from pcenet.nn.kernels import winograd_matrices

WINOGRAD_TILE = 4


def tile_of(patch_size: int, kernel_size: int) -> int:
    """T for patches of a side."""
    return WINOGRAD_TILE if patch_size % WINOGRAD_TILE == 0 and kernel_size == 3 else 1


class Tiles:
    """Which rows the tiles of one routing read and write.

    Args:
        choice: the routing.
        size: H and W of the map.
        side: S.
        tile: T.
        kernel: side of the convolutions' kernel, 3 or 1.

    Attributes:
        counts: tiles of each expert.
    """

    def __init__(self, choice: Choice, size: tuple[int, int], side: int, tile: int, kernel: int) -> None:
        self.choice, self.size, self.side, self.tile = choice, size, side, tile
        self.margin = kernel // 2
        self.per_axis = side // tile
        self.taps = tile + kernel - 1
        self.per_patch = self.per_axis**2
        self.counts = [load * self.per_patch for load in choice.loads]
        self.total = len(choice.order) * self.per_patch
        self.device = choice.order.device
        # The map lies inside a margin, and is filled up to whole patches.
        self.inner = (choice.grid.rows * side, choice.grid.columns * side)
        self.padded = (self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin)

    def _arange(self, *sizes: int) -> list[Tensor]:
        """Coordinates of cells: for each axis its numbers, in a shape that makes all of them broadcast."""
        return [
            torch.arange(size, device=self.device).view([-1 if axis == index else 1 for index in range(len(sizes))])
            for axis, size in enumerate(sizes)
        ]

    def rows_of_map(self, pixels: Tensor) -> Tensor:
        """A map ``[B, H, W, C]`` as rows, zeros around it; the first row is zeros where there is a margin."""
        below, right = self.inner[0] - self.size[0], self.inner[1] - self.size[1]
        m = self.margin
        return F.pad(pixels, (0, 0, m, m + right, m, m + below)).flatten(0, 2)

    def reads(self, own: bool) -> Tensor:
        """The cells of the padded map that tiles read, ``[K, M]``; under ``own`` the zeros of its corner stand for
        whatever lies beyond the tile's patch."""
        grid, width, tile = self.choice.grid, self.padded[1], self.tile
        image, row, column = self._arange(grid.batch, grid.rows, grid.columns)
        corner = image * (self.padded[0] * width) + (row * width + column) * self.side
        tile_row, tile_column, tap_row, tap_column = self._arange(self.per_axis, self.per_axis, self.taps, self.taps)
        cell_row, cell_column = tile_row * tile + tap_row, tile_column * tile + tap_column
        offset = (cell_row * width + cell_column).flatten(0, 1).flatten(1).T
        read = corner.flatten().index_select(0, self.choice.patch)[:, None] + offset[:, None]
        if own:
            read = torch.where(self._inside(cell_row, cell_column)[:, None], read, 0)
        return read.flatten(1)

    def _inside(self, cell_row: Tensor, cell_column: Tensor) -> Tensor:
        """Whether cells of a patch and its margin lie in the patch, ``[K, q**2]``."""
        on_axis = [(cell >= self.margin) & (cell < self.side + self.margin) for cell in (cell_row, cell_column)]
        return (on_axis[0] & on_axis[1]).flatten(0, 1).flatten(1).T

    def places(self) -> Tensor:
        """The rows of `TileConv`'s output in which the pixels of all pairs' patches lie, ``[B, h*S, w*S, k]``."""
        grid, q, tile = self.choice.grid, self.per_axis, self.tile
        top_k = self.choice.expert.shape[1]
        rank = self.choice.rank.view(grid.batch, grid.rows, 1, 1, grid.columns, 1, 1, top_k) * self.per_patch
        _, _, tile_row, cell_row, _, tile_column, cell_column, _ = self._arange(1, 1, q, tile, 1, q, tile, 1)
        inside = tile_row * q + tile_column + (cell_row * tile + cell_column) * self.stride
        return (rank + inside).flatten(4, 6).flatten(1, 3)

    @property
    def stride(self) -> int:
        """Rows between two cells of a tile."""
        return self.total + 1

    def reads_of_neighbours(self, reads: Tensor) -> Tensor:
        """What tiles read, ``[K, M]``, of another convolution's output; only for k = 1."""
        (height, width), m = self.size, self.margin
        places = self.places()[:, :height, :width, 0]
        below, right = self.padded[0] - 2 * m - height, self.padded[1] - 2 * m - width
        # Shifted so that the padding's zeros stand for the row of zeros.
        padded = F.pad(places - self.total, (m, m + right, m, m + below)) + self.total
        return padded.flatten().index_select(0, reads.flatten()).view(reads.shape)

    def reads_of_own(self) -> Tensor:
        """What tiles read, ``[K, M]``, of their own patch in another convolution's output; else the row of zeros."""
        q, tile = self.per_axis, self.tile
        tile_row, tile_column, tap_row, tap_column = self._arange(q, q, self.taps, self.taps)
        cell_row, cell_column = tile_row * tile + tap_row, tile_column * tile + tap_column
        row, column = cell_row - self.margin, cell_column - self.margin
        inside = (row % tile * tile + column % tile) * self.stride + row // tile * q + column // tile
        place = inside.flatten(0, 1).flatten(1).T[:, None] + self._arange(len(self.choice.order), 1)[0] * self.per_patch
        return torch.where(self._inside(cell_row, cell_column)[:, None], place, self.total).flatten(1)

    def to_map(self, out: Tensor) -> Tensor:
        """`TileConv`'s output ``[T**2, M + 1, D]``, weighted and summed over each patch's experts, as a map ``[B, H, W,
        D]``."""
        rows, (height, width) = out.flatten(0, 1), self.size
        places = self.places()[:, :height, :width]
        weight = self.choice.weight
        total: Tensor | None = None
        for index, place in enumerate(places.unbind(3)):
            picked = rows.index_select(0, place.flatten())
            if weight is not None:
                picked = picked * self._of_pixels(weight[:, index])
            total = picked if total is None else total + picked
        assert total is not None
        return total.view(self.choice.grid.batch, height, width, -1)

    def _of_pixels(self, per_patch: Tensor) -> Tensor:
        """``[N]`` to ``[B*H*W, 1]``."""
        grid, side = self.choice.grid, self.side
        cells = per_patch.view(grid.batch, grid.rows, 1, grid.columns, 1).expand(-1, -1, side, -1, side)
        return cells.flatten(3).flatten(1, 2)[:, : self.size[0], : self.size[1]].reshape(-1, 1)


class TileConv(nn.Module):
    """E convolutions, each on the tiles of its own patches.

    Args:
        weight: ``[E, D, C, 3, 3]``, or 1x1.
        bias: ``[E, D]``.
        tile: T.
        norm: a group normalisation that follows; a batch normalisation is part of weight and bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor, tile: int, norm: StackedNorm | None = None) -> None:
        super().__init__()
        self.tile, self.out_channels = tile, weight.shape[1]
        self.kernel_size = weight.shape[-1]
        # Apart, so that they are constants of their own in a file.
        self.bias = _fixed_list(bias)
        if tile == 1:
            self.weight = _fixed_list(weight.permute(0, 3, 4, 2, 1).flatten(1, 3))
        else:
            read, kernel, write = (torch.kron(each, each) for each in winograd_matrices(tile))
            transformed = torch.einsum("pt,edct->epcd", kernel, weight.flatten(3).double())
            self.weight = _fixed_list(transformed.to(weight.dtype))
            self.register_buffer("read", read.to(weight.dtype))
            self.register_buffer("write", write.to(weight.dtype))
        self.norm = None if norm is None else FixedGroupNorm(norm)

    def forward(self, rows: Tensor, reads: Tensor, tiles: Tiles) -> Tensor:
        """Convolve tiles.

        Args:
            rows: ``[Z, C]``.
            reads: ``[K, M]``, the rows that each tile reads.
            tiles: which tiles are whose.

        Returns:
            ``[T**2, M + 1, D]``, the last tile zeros.
        """
        # A tile's cells side by side for one product; for Winograd's transform the cells of all tiles.
        own = torch.split(reads.T.contiguous() if self.tile == 1 else reads, tiles.counts, dim=0 if self.tile == 1 else 1)
        parts = []
        for expert, index in enumerate(own):
            out = self._convolve(rows.index_select(0, index.flatten()), expert)
            if self.norm is not None:
                out = self.norm(out, expert, tiles)
            parts.append(out)
        parts.append(rows.new_zeros(self.tile**2, 1, self.out_channels))
        return torch.cat(parts, dim=1)

    def _convolve(self, windows: Tensor, expert: int) -> Tensor:
        """Rows ``[K * m, C]`` to ``[T**2, m, D]``."""
        channels = windows.shape[1]
        if self.tile == 1:
            vectors = windows.view(-1, self.kernel_size**2 * channels)
            return torch.addmm(self.bias[expert], vectors, self.weight[expert])[None]
        cells = (self.tile + self.kernel_size - 1) ** 2
        transformed = (self.read @ windows.view(cells, -1)).view(cells, -1, channels)
        products = (transformed @ self.weight[expert]).view(cells, -1)
        out = (self.write @ products).view(-1, self.out_channels) + self.bias[expert]
        return out.view(self.tile**2, -1, self.out_channels)


class FixedGroupNorm(nn.Module):
    """Group normalisation of the experts' patches, over the cells that lie on the map."""

    def __init__(self, norm: StackedNorm) -> None:
        super().__init__()
        self.groups = norm.groups
        self.weight, self.bias = _fixed_list(norm.weight), _fixed_list(norm.bias)

    def forward(self, out: Tensor, expert: int, tiles: Tiles) -> Tensor:
        """Tiles of an expert's patches ``[T**2, m, D]``, normalised patch by patch."""
        grouped = out.view(out.shape[0], -1, tiles.per_patch, self.groups, out.shape[2] // self.groups)
        mask = self._real(tiles, expert)
        count = mask.sum((0, 2, 3, 4), keepdim=True) * grouped.shape[4]
        centred = grouped - (grouped * mask).sum((0, 2, 4), keepdim=True) / count
        variance = (centred.square() * mask).sum((0, 2, 4), keepdim=True) / count
        normalised = (centred * torch.rsqrt(variance + NORM_EPS)).view(out.shape)
        return normalised * self.weight[expert] + self.bias[expert]

    def _real(self, tiles: Tiles, expert: int) -> Tensor:
        """``[T**2, n_e, q**2, 1, 1]``, 1 for cells on the map, else 0."""
        grid, q, tile = tiles.choice.grid, tiles.per_axis, tiles.tile
        cell = tiles._arange(tile, tile, 1, grid.rows, grid.columns, q, q)
        row = (cell[3] * q + cell[5]) * tile + cell[0]
        column = (cell[4] * q + cell[6]) * tile + cell[1]
        real = ((row < tiles.size[0]) & (column < tiles.size[1])).flatten(5).flatten(2, 4).flatten(0, 1)
        own = torch.split(tiles.choice.patch % (grid.rows * grid.columns), tiles.choice.loads)[expert]
        return real.index_select(1, own)[..., None, None].to(self.bias[0].dtype)


def _fixed_list(stacked: Tensor) -> nn.ParameterList:
    """One parameter for each expert's slice of ``[E, ...]``."""
    return nn.ParameterList(nn.Parameter(part.clone(), requires_grad=False) for part in stacked.detach().unbind(0))
