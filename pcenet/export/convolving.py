"""Convolutions by experts in a network that no longer learns. Each expert reads what its own patches need,
in operators that exporters know: gathers and matrix products, which run at full speed everywhere.

A patch is cut into tiles: of 4x4 or 2x2 pixels where they divide it and are many, by Winograd's algorithm, at a quarter
or less than half of the products; else of one pixel, whose convolution is a matrix product of what it reads. Pixels of
a map are rows of C numbers. Axes as in `pcenet.export.routing`; K cells that a tile reads, Z rows, D channels out.
Tiles lie sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.export.routing import Choice

TILES = (4, 2, 1)
# The points of Winograd's algorithm for tiles of 2 and 4. The usual ones of 4, with 1 and 2 instead of 2/3 and 3/2,
# double the rounding errors.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}
# Winograd's kernels are two to four times as large: for fewer tiles than this, reading them takes the time.
FEW_TILES = 8


def tile_of(patch_size: int, kernel_size: int, patches: float) -> int:
    """T for patches of a side.

    Args:
        patch_size: S.
        kernel_size: 3 or 1.
        patches: that an expert serves on average, inf where that is open; what would be few tiles is cut into pixels.
    """
    if kernel_size == 1:
        return 1
    tile = next(tile for tile in TILES if patch_size % tile == 0)
    return tile if patches * (patch_size // tile) ** 2 >= FEW_TILES else 1


class Tiles:
    """Which rows the tiles of one routing read and write.

    Reads are listed as a convolution takes them: for tiles of one pixel ``[M, K]``, what a tile reads side by side for
    one matrix product; for larger ones ``[K, M]``, the first cells of all tiles, then the second ones, for a transform.

    Args:
        choice: the routing.
        size: H and W of the map.
        side: S.
        tile: T.
        kernel: side of the convolutions' kernel, 3 or 1.

    Attributes:
        counts: ``[E]`` int64, tiles of each expert.
        total: M.
    """

    def __init__(self, choice: Choice, size: tuple[int, int], side: int, tile: int, kernel: int) -> None:
        self.choice, self.size, self.side, self.tile = choice, size, side, tile
        self.margin = kernel // 2
        self.per_axis = side // tile
        self.taps = tile + kernel - 1
        self.per_patch = self.per_axis**2
        self.counts = choice.loads * self.per_patch
        self.total = choice.order.shape[0] * self.per_patch
        self.device = choice.order.device
        # The map lies inside a margin, and is filled up to whole patches.
        self.inner = (choice.grid.rows * side, choice.grid.columns * side)
        self.padded = (self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin)

    def axes(self, *sizes: int) -> list[Tensor]:
        """For each axis the numbers of its cells, in a shape that makes all axes broadcast."""
        return [
            torch.arange(size, device=self.device).view([-1 if axis == index else 1 for index in range(len(sizes))])
            for axis, size in enumerate(sizes)
        ]

    def _cells(self) -> tuple[Tensor, Tensor]:
        """Row and column, in the patch and its margin, of the cells that a patch's tiles read; each broadcasts to ``[q,
        q, taps, taps]``."""
        tile_row, tile_column, tap_row, tap_column = self.axes(self.per_axis, self.per_axis, self.taps, self.taps)
        return tile_row * self.tile + tap_row, tile_column * self.tile + tap_column

    def _listed(self, per_patch: Tensor, start: Tensor | None = None) -> Tensor:
        """``[q, q, taps, taps]``, the same for every patch, as reads, ``start`` ``[R]`` added; without it, as what
        broadcasts to reads whose tiles are still apart by patch."""
        flat = per_patch.flatten(2).flatten(0, 1)
        if self.tile == 1:
            return flat[None] if start is None else flat + start[:, None, None]
        return flat.T[:, None] if start is None else flat.T[:, None] + start[:, None]

    def _joined(self, reads: Tensor) -> Tensor:
        return reads.flatten(0, 1) if self.tile == 1 else reads.flatten(1)

    def _inside(self) -> Tensor:
        """Whether what is read lies in the tile's own patch."""
        on_axis = [(cell >= self.margin) & (cell < self.side + self.margin) for cell in self._cells()]
        return self._listed(on_axis[0] & on_axis[1])

    def rows_of_map(self, pixels: Tensor) -> Tensor:
        """A map ``[B, H, W, C]`` as rows, zeros around it; the first row is zeros where there is a margin."""
        below, right = self.inner[0] - self.size[0], self.inner[1] - self.size[1]
        m = self.margin
        return F.pad(pixels, (0, 0, m, m + right, m, m + below)).flatten(0, 2)

    def reads(self, own: bool) -> Tensor:
        """The rows of `rows_of_map` that tiles read; under ``own`` zeros for whatever lies beyond the tile's patch."""
        grid, width = self.choice.grid, self.padded[1]
        image, row, column = self.axes(grid.batch, grid.rows, grid.columns)
        corner = image * (self.padded[0] * width) + (row * width + column) * self.side
        cell_row, cell_column = self._cells()
        start = corner.flatten().index_select(0, self.choice.patch)
        reads = self._listed(cell_row * width + cell_column, start)
        return self._joined(torch.where(self._inside(), reads, 0) if own else reads)

    def places(self) -> list[Tensor]:
        """For each of a patch's k experts the rows of `TileConv`'s output in which pixels lie, ``[B, h*S, w*S]``."""
        grid, q, tile = self.choice.grid, self.per_axis, self.tile
        top_k = self.choice.expert.shape[1]
        _, _, tile_row, cell_row, _, tile_column, cell_column = self.axes(1, 1, q, tile, 1, q, tile)
        inside = 1 + tile_row * q + tile_column + (cell_row * tile + cell_column) * (self.total + 1)
        ranks = [self.choice.rank] if top_k == 1 else self.choice.rank.view(-1, top_k).unbind(1)
        return [
            (rank.view(grid.batch, grid.rows, 1, 1, grid.columns, 1, 1) * self.per_patch + inside).reshape(
                grid.batch, *self.inner
            )
            for rank in ranks
        ]

    def reads_of_output(self, reads: Tensor) -> Tensor:
        """The rows of another convolution's output that are where ``reads`` reads of the map, each tile of its own
        choice's; the row of zeros for what lies beyond the map."""
        (height, width), m = self.size, self.margin
        below, right = self.padded[0] - 2 * m - height, self.padded[1] - 2 * m - width
        maps = [F.pad(places[:, :height, :width], (m, m + right, m, m + below)) for places in self.places()]
        if len(maps) > 1:
            first = (self.choice.order % len(maps) * maps[0].numel())[:, None].expand(-1, self.per_patch).flatten()
            reads = reads + (first[:, None] if self.tile == 1 else first)
        return F.embedding(reads, torch.stack(maps).view(-1, 1)).squeeze(2)

    def owners(self) -> Tensor:
        """``[1 + M]``: the expert of each tile, before them E for the tile of zeros."""
        owner = self.choice.owner
        if self.per_patch > 1:
            owner = owner[:, None].expand(-1, self.per_patch).flatten()
        return F.pad(owner, (1, 0), value=len(self.counts))

    def to_map(self, rows: Tensor) -> Tensor:
        """`TileConv`'s output, weighted and summed over each patch's experts, as a map ``[B, H, W, D]``."""
        grid, side, weight = self.choice.grid, self.side, self.choice.weight
        total: Tensor | None = None
        for index, places in enumerate(self.places()):
            picked = F.embedding(places, rows)
            if weight is not None:
                own = weight if weight.shape[1] == 1 else weight[:, index]
                by_patch = picked.view(grid.batch, grid.rows, side, grid.columns, side, -1)
                picked = by_patch * own.view(grid.batch, grid.rows, 1, grid.columns, 1, 1)
            total = picked if total is None else total + picked
        assert total is not None
        return total.reshape(grid.batch, *self.inner, -1)[:, : self.size[0], : self.size[1]]


class TileConv(nn.Module):
    """E convolutions, each on the tiles of its own patches.

    Args:
        weight: ``[E, D, C, 3, 3]``, or 1x1.
        bias: ``[E, D]``.
        tile: T.

    Attributes:
        opaque: whether this is one operator, ``pcenet::convolve_tiles``, to an exporter that knows how to write it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, tile: int) -> None:
        super().__init__()
        self.tile, self.opaque = tile, False
        self.transforms = nn.ParameterList()
        # What is used apart is a parameter of its own, and so a constant of its own in a file.
        if tile == 1:
            self.bias = _fixed_list(bias)
            self.weight = _fixed_list(weight.permute(0, 3, 4, 2, 1).flatten(1, 3))
        else:
            read, kernel, write = (torch.kron(each, each) for each in winograd_matrices(tile))
            transformed = torch.einsum("pt,edct->epcd", kernel.to(weight.device), weight.flatten(3).double())
            self.bias = _fixed_list([F.pad(bias, (0, 0, 0, 1))])
            self.weight = _fixed_list(transformed.to(weight.dtype))
            self.transforms = _fixed_list(matrix.to(weight) for matrix in (read, write))

    def forward(self, rows: Tensor, reads: Tensor, tiles: Tiles) -> Tensor:
        """Convolve tiles.

        Args:
            rows: ``[Z, C]``.
            reads: the rows that each tile reads.
            tiles: which tiles are whose.

        Returns:
            ``[T**2 * (1 + M), D]``: a tile's first cell, of all tiles, then the second one; the first tile is zeros.
        """
        run = convolve_tiles_opaque if self.opaque else convolve_tiles
        owners = tiles.owners() if self.transforms else None
        return run(rows, reads, tiles.counts, owners, list(self.weight), list(self.bias), list(self.transforms))


def convolve_tiles(
    rows: Tensor,
    reads: Tensor,
    counts: Tensor,
    owners: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    transforms: list[Tensor],
) -> Tensor:
    """Each expert's convolution of its own tiles.

    Args:
        rows: ``[Z, C]``.
        reads: the rows that tiles read, as `Tiles` lists them.
        counts: ``[E]`` int64, tiles of each expert; their sum is M.
        owners: ``[1 + M]`` int64, E and the expert of each tile; None where tiles are one pixel.
        weights: an expert's ``[K * C, D]`` where tiles are one pixel, else ``[(T + 2)**2, C, D]``, transformed.
        biases: an expert's ``[D]`` where tiles are one pixel, else ``[E + 1, D]`` of all experts, zeros at the end.
        transforms: Winograd's matrices for reading ``[(T + 2)**2, (T + 2)**2]`` and writing ``[T**2, (T + 2)**2]``;
            none where tiles are one pixel.

    Returns:
        As `TileConv.forward`.
    """
    sizes: list[int] = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)
    windows = [rows.index_select(0, index.flatten()) for index in reads.split(sizes, dim=1 if transforms else 0)]
    if owners is None:
        parts = [
            torch.addmm(bias, own.view(-1, len(weight)), weight)
            for own, weight, bias in zip(windows, weights, biases, strict=True)
        ]
        return torch.cat((rows.new_zeros(1, len(biases[0])), *parts))
    (read, write), (bias,), (cells, channels, width) = transforms, biases, weights[0].shape
    parts = [rows.new_zeros(len(write), width)]
    for own, weight in zip(windows, weights, strict=True):
        products = (read @ own.view(cells, -1)).view(cells, -1, channels) @ weight
        parts.append(write @ products.view(cells, -1))
    return (torch.cat(parts, dim=1).view(len(write), -1, width) + bias.index_select(0, owners)).flatten(0, 1)


# As one operator, whose shapes do not depend on the routing.
convolve_tiles_opaque = torch.library.custom_op("pcenet::convolve_tiles", convolve_tiles, mutates_args=())


@convolve_tiles_opaque.register_fake
def _(
    rows: Tensor,
    reads: Tensor,
    counts: Tensor,
    owners: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    transforms: list[Tensor],
) -> Tensor:
    cells, tiles = (1, reads.shape[0]) if owners is None else (len(transforms[1]), reads.shape[1])
    return rows.new_empty(cells * (tiles + 1), weights[0].shape[-1])


def winograd_matrices(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """B ``[S + 2, S + 2]``, G ``[S + 2, 3]`` and A ``[S, S + 2]`` of F(S, 3), float64.

    By Toom and Cook: polynomials of lengths S and 3 are multiplied by their values at S + 2 points, of which one is
    infinity, and a correlation is the transpose of such a product.

    >>> read, kernel, write = winograd_matrices(2)
    >>> x, w = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([1.0, 10, 100]).double()
    >>> write @ ((kernel @ w) * (read @ x))
    tensor([321., 432.], dtype=torch.float64)
    """
    points = torch.tensor(_POINTS[side], dtype=torch.float64)

    def values(length: int) -> Tensor:
        at_points = points[:, None] ** torch.arange(length)
        at_infinity = torch.zeros(1, length, dtype=torch.float64)
        at_infinity[0, -1] = 1
        return torch.cat((at_points, at_infinity))

    return torch.linalg.inv(values(side + 2)).T, values(3), values(side).T


def _fixed_list(parts: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(part.detach().clone().contiguous(), requires_grad=False) for part in parts)
