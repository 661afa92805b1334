"""The experts' convolution as gathers and matrix products, which every runtime does at full speed: what an ONNX file
has in the place of `pcenet.ops.patch_conv2d`.

A patch is cut into tiles: of 4x4 or 2x2 pixels where they divide it and are many, by Winograd's algorithm, at a quarter
or less than half of the products; else of one pixel, whose convolution is a matrix product of what it reads. Pixels of
a map are rows of C numbers; tiles lie sorted by expert. Axes as in `pcenet.ops.functional`; T side of a tile, q = S / T
tiles on each axis of a patch, M = N * q**2 tiles, R = T + K - 1 pixels on each axis that a tile reads, Z rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.ops import Affine

TILES = (4, 2, 1)
# The points of Winograd's algorithm for tiles of 2 and 4. The usual ones of 4, with 1 and 2 instead of 2/3 and 3/2,
# double the rounding errors.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}
# Winograd's kernels are two to four times as large: for fewer tiles than this, reading them takes the time.
FEW_TILES = 8


class Lowering:
    """`pcenet.ops.patch_conv2d` for float32 where every patch has an expert, to be traced; one for each trace.

    A convolution of what another one has just put out reads it where it lies, sorted by expert: the map between them is
    not written.

    Args:
        opaque: whether `convolve_tiles` is one operator to the tracer, which an exporter has to know how to write; else
            it is torch's own ones.
    """

    def __init__(self, opaque: bool) -> None:
        self._convolve = convolve_tiles_opaque if opaque else convolve_tiles
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # a map, its rows and in which of them pixels are

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        patch_size: int,
        neighbours: bool,
        *,
        base: Tensor | None,
        then: Affine,
    ) -> Tensor:
        """As `pcenet.ops.patch_conv2d`."""
        scale, shift, gelu, gate, residual = then
        kernel = weight.shape[-1]
        tile = tile_of(patch_size, kernel, expert.shape[0], weight.shape[0])
        tiles = Tiles(x.shape[0], x.shape[2], x.shape[3], patch_size, tile, kernel, x.device)
        owner, order = torch.sort(expert, stable=True)
        counts = (expert == torch.arange(weight.shape[0], device=x.device)[:, None]).sum(1) * tiles.per_axis**2
        if base is not None:
            weight = weight + base
        if scale is not None:
            weight = weight * scale[:, :, None, None, None]
        kernels, transforms = tile_kernels(weight, tile)
        reads = tiles.reads(order, neighbours)
        if self._last is not None and self._last[0] is x:
            _, rows, places = self._last
            reads = F.embedding(reads, tiles.padded(places[..., None]).flatten(0, 2)).squeeze(-1)
        else:
            rows = tiles.padded(x.permute(0, 2, 3, 1)).flatten(0, 2)
        shifts = [] if shift is None or transforms else _each(shift)
        rows = self._convolve(rows, reads, counts, kernels, shifts, transforms)
        if shift is not None and transforms:
            owners = F.pad(owner[:, None].expand(-1, tiles.per_axis**2).flatten(), (1, 0), value=len(kernels))
            by_tile = F.pad(shift, (0, 0, 0, 1)).index_select(0, owners)
            rows = (rows.view(tile**2, -1, rows.shape[1]) + by_tile).flatten(0, 1)
        if gelu:
            rows = F.gelu(rows)
        places = tiles.places(order)
        out = F.embedding(places, rows)
        if gate is not None:
            by_patch = out.view(x.shape[0], tiles.rows, patch_size, tiles.columns, patch_size, -1)
            out = (by_patch * gate.view(x.shape[0], tiles.rows, 1, tiles.columns, 1, 1)).view_as(out)
        out = out[:, : tiles.height, : tiles.width]
        if residual is not None:
            out = residual.permute(0, 2, 3, 1) + out
        out = out.permute(0, 3, 1, 2)
        self._last = (out, rows, places[:, : tiles.height, : tiles.width]) if gate is residual is None else None
        return out


def tile_of(patch_size: int, kernel_size: int, patches: int, num_experts: int) -> int:
    """T for patches of a side; what would be few tiles for each expert is cut into pixels, unless their number, which
    a tracer leaves open, is no ``int``."""
    if kernel_size == 1:
        return 1
    tile = next(tile for tile in TILES if patch_size % tile == 0)
    few = isinstance(patches, int) and patches * (patch_size // tile) ** 2 < FEW_TILES * num_experts
    return 1 if few else tile


@dataclass(frozen=True)
class Tiles:
    """Which rows the tiles of a map read and write.

    Reads are listed as `convolve_tiles` takes them: for tiles of one pixel ``[M, K**2]``, what a tile reads side by
    side for one matrix product; for larger ones ``[R**2, M]``, the first cells of all tiles, then the second ones, for
    a transform.

    Attributes:
        batch: B.
        height: H.
        width: W.
        side: S.
        tile: T.
        kernel: K.
        device: of the map.
    """

    batch: int
    height: int
    width: int
    side: int
    tile: int
    kernel: int
    device: torch.device

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return -(-self.height // self.side)

    @property
    def columns(self) -> int:
        """Columns of patches."""
        return -(-self.width // self.side)

    @property
    def per_axis(self) -> int:
        """q."""
        return self.side // self.tile

    @property
    def margin(self) -> int:
        """Zeros around the map, which itself is filled up to whole patches."""
        return self.kernel // 2

    def padded(self, pixels: Tensor) -> Tensor:
        """A map ``[B, H, W, C]`` with zeros around it."""
        m, below, right = self.margin, self.rows * self.side - self.height, self.columns * self.side - self.width
        return F.pad(pixels, (0, 0, m, m + right, m, m + below))

    def reads(self, order: Tensor, neighbours: bool) -> Tensor:
        """Which pixels of the padded map, counted row by row, the tiles of patches in ``order`` ``[N]`` read; without
        neighbours the first one, which is zero, for whatever lies beyond the tile's patch."""
        m, line = self.margin, self.columns * self.side + 2 * self.margin
        image, row, column = self._axes(self.batch, self.rows, self.columns)
        corner = (image * (self.rows * self.side + 2 * m) * line + (row * line + column) * self.side).flatten()
        reach = self.tile + self.kernel - 1
        tile_row, tile_column, tap_row, tap_column = self._axes(self.per_axis, self.per_axis, reach, reach)
        cell_row, cell_column = tile_row * self.tile + tap_row, tile_column * self.tile + tap_column
        inside = [(cell >= m) & (cell < self.side + m) for cell in (cell_row, cell_column)]
        cells, own = (part.flatten(2).flatten(0, 1) for part in (cell_row * line + cell_column, inside[0] & inside[1]))
        start = corner.index_select(0, order)
        if self.tile == 1:
            reads = start[:, None, None] + cells
            return (reads if neighbours else torch.where(own, reads, 0)).flatten(0, 1)
        reads = start[:, None] + cells.T[:, None]
        return (reads if neighbours else torch.where(own.T[:, None], reads, 0)).flatten(1)

    def places(self, order: Tensor) -> Tensor:
        """In which rows of `convolve_tiles`' output the pixels of patches in ``order`` lie, ``[B, rows * S, columns *
        S]``."""
        q, tile = self.per_axis, self.tile
        patches = torch.arange(order.shape[0], device=self.device)
        rank = order.scatter(0, order, patches)  # the inverse
        _, _, tile_row, cell_row, _, tile_column, cell_column = self._axes(1, 1, q, tile, 1, q, tile)
        own = 1 + tile_row * q + tile_column + (cell_row * tile + cell_column) * (order.shape[0] * q**2 + 1)
        places = rank.view(self.batch, self.rows, 1, 1, self.columns, 1, 1) * q**2 + own
        return places.reshape(self.batch, self.rows * self.side, self.columns * self.side)

    def _axes(self, *sizes: int) -> list[Tensor]:
        """For each axis the numbers of its cells, in a shape that makes all axes broadcast."""
        return [
            torch.arange(size, device=self.device).view([-1 if axis == index else 1 for index in range(len(sizes))])
            for axis, size in enumerate(sizes)
        ]


def tile_kernels(weight: Tensor, tile: int) -> tuple[list[Tensor], list[Tensor]]:
    """Kernels ``[E, D, C, K, K]`` as `convolve_tiles` takes them, and Winograd's matrices."""
    if tile == 1:
        return _each(weight.permute(0, 3, 4, 2, 1).flatten(1, 3)), []
    read, kernel, write = (torch.tensor(each, dtype=torch.float64) for each in _SQUARED[tile])
    transformed = (weight.flatten(3).double() @ kernel.T).permute(0, 3, 2, 1).to(weight.dtype)
    return _each(transformed), [matrix.to(weight) for matrix in (read, write)]


def _each(stacked: Tensor) -> list[Tensor]:
    # Not by unbind, which is a node of many outputs: those are not computed while a file is written.
    return [stacked[index] for index in range(stacked.shape[0])]


def convolve_tiles(
    rows: Tensor,
    reads: Tensor,
    counts: Tensor,
    kernels: list[Tensor],
    shifts: list[Tensor],
    transforms: list[Tensor],
) -> Tensor:
    """Each expert's convolution of its own tiles.

    Args:
        rows: ``[Z, C]``.
        reads: the rows that tiles read, as `Tiles` lists them.
        counts: ``[E]`` int64, tiles of each expert; their sum is M.
        kernels: an expert's ``[K**2 * C, D]`` where tiles are one pixel, else ``[R**2, C, D]``, transformed.
        shifts: what each expert adds where tiles are one pixel, ``[D]``; or none.
        transforms: Winograd's matrices for reading ``[R**2, R**2]`` and writing ``[T**2, R**2]``; none where tiles are
            one pixel.

    Returns:
        ``[T**2 * (1 + M), D]``: a tile's first cell, of all tiles, then the second one; the first tile is zeros.
    """
    parts = [rows.new_zeros(len(transforms[1]) if transforms else 1, 1, kernels[0].shape[-1])]
    sizes: list[int] = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)
    split = reads.split(sizes, dim=1 if transforms else 0)
    for expert, (own, kernel) in enumerate(zip(split, kernels, strict=True)):
        windows = rows.index_select(0, own.flatten())
        if transforms:
            read, write = transforms
            products = (read @ windows.view(len(read), -1)).view(len(read), -1, rows.shape[1]) @ kernel
            out = (write @ products.flatten(1)).view(len(write), -1, kernel.shape[-1])
        else:
            product = windows.view(-1, len(kernel)) @ kernel
            out = (product + shifts[expert] if shifts else product)[None]
        parts.append(out)
    return torch.cat(parts, dim=1).flatten(0, 1)


# As one operator, whose shapes do not depend on the routing.
convolve_tiles_opaque = torch.library.custom_op("pcenet_export::convolve_tiles", convolve_tiles, mutates_args=())


@convolve_tiles_opaque.register_fake
def _(
    rows: Tensor,
    reads: Tensor,
    counts: Tensor,
    kernels: list[Tensor],
    shifts: list[Tensor],
    transforms: list[Tensor],
) -> Tensor:
    cells, tiles = (len(transforms[1]), reads.shape[1]) if transforms else (1, reads.shape[0])
    return rows.new_empty(cells * (1 + tiles), kernels[0].shape[-1])


def winograd_matrices(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """B ``[T + 2, T + 2]``, G ``[T + 2, 3]`` and A ``[T, T + 2]`` of F(T, 3), float64.

    By Toom and Cook: polynomials of lengths T and 3 are multiplied by their values at T + 2 points, of which one is
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


# For both axes, and as plain numbers, which a tracer takes for what they are.
_SQUARED = {
    side: [torch.kron(matrix, matrix).tolist() for matrix in winograd_matrices(side)] for side in TILES if side > 1
}
