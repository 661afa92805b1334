"""How an expert's convolution, 3x3 or 1x1, runs on a batch of patches: as a convolution, or as one or several matrix
products.

Axes: n patches, S patch side, m margin (pixels of a patch's surroundings that are read: 0 or 1), C channels in, D
channels out, G blocks of b patches each. What a patch's convolution reads comes as a window ``[cells, C]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn.constants import constant
from pcenet.nn.patches import Grid
from pcenet.nn.windows import Windows, make_windows

# Up to this side a patch is multiplied instead of convolved: a kernel of 3x3 sees so little of it that the libraries'
# convolutions fall to a third of their speed and less (docs/performance.md).
MATRIX_SIDE = 2
# The points of Winograd's algorithm for tiles of 2 and 4. The usual ones of 4, with 1 and 2 instead of 2/3 and 3/2,
# double the rounding errors.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}


class Kernel(ABC):
    """E convolutions in the form in which they are run.

    What a window lists is described by `pcenet.nn.windows.make_windows`.

    Attributes:
        weight: ``[E, ...]``, differentiable.
        side: S.
        margin: m.
        spots: number of spots on each axis.
        taps: number of taps on each axis.
    """

    weight: Tensor
    spots: int
    taps: int

    def __init__(self, side: int, margin: int) -> None:
        self.side = side
        self.margin = margin

    def windows(self, grid: Grid, size: tuple[int, int], device: torch.device) -> Windows:
        """What patches read of maps of a ``size`` = (H, W)."""
        return make_windows(
            grid,
            size,
            self.side,
            spots=self.spots,
            taps=self.taps,
            margin=self.margin,
            device=device,
        )

    @abstractmethod
    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        """Windows ``[n, cells, C]`` through one expert's weight: patches ``[n, D, S, S]``, channels-last."""

    @abstractmethod
    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        """The gradients of `apply` for the windows (only where ``needed``; else undefined) and for the weight."""


class PlainKernel(Kernel):
    """A kernel of operators that every compiler and exporter knows."""

    @abstractmethod
    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        """Windows ``[G * b, cells, C]`` through G weights ``[G, ...]``, one for each block: ``[G * b, D, S, S]``."""


def make_plain_kernel(weight: Tensor, side: int, margin: int) -> PlainKernel:
    """Convolutions ``[E, D, C, 3, 3]``, or 1x1 without margin, on patches of a side."""
    small = side <= MATRIX_SIDE or weight.shape[-1] == 1
    return MatrixKernel(weight, side, margin) if small else WindowKernel(weight, side, margin)


def make_kernel(weight: Tensor, side: int, margin: int) -> Kernel:
    """The fastest form of convolutions ``[E, D, C, 3, 3]``, or 1x1 without margin, on patches of a side
    (docs/performance.md)."""
    precise = weight.dtype in (torch.float32, torch.float64)
    if side in _POINTS and weight.shape[-1] == 3 and precise and weight.device.type == "cpu":
        return WinogradKernel(weight, side, margin)
    return make_plain_kernel(weight, side, margin)


class WindowKernel(PlainKernel):
    """A convolution on windows of S + 2m pixels a side; without margin it pads with zeros."""

    def __init__(self, weight: Tensor, side: int, margin: int) -> None:
        super().__init__(side, margin)
        self.weight = weight
        self.spots, self.taps = 1, side + 2 * margin
        self.padding = weight.shape[-1] // 2 - margin

    def _maps(self, windows: Tensor) -> Tensor:
        return windows.unflatten(1, (self.taps, self.taps)).permute(0, 3, 1, 2)

    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        """See `Kernel.apply`."""
        return F.conv2d(self._maps(windows), weight, padding=self.padding)

    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        for_maps, for_weight = _convolution_gradients(grad, self._maps(windows), weight, self.padding, needed)
        return for_maps.permute(0, 2, 3, 1).flatten(1, 2) if needed else for_maps, for_weight

    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        """See `PlainKernel.apply_blocks`."""
        # One grouped convolution: group g of the channels is convolved with block g's kernel.
        blocks = len(weight)
        grouped = self._maps(windows).unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1, 2)
        out = F.conv2d(grouped, weight.flatten(0, 1), padding=self.padding, groups=blocks)
        return out.unflatten(1, (blocks, -1)).transpose(0, 1).flatten(0, 1)


class MatrixKernel(PlainKernel):
    """A matrix product, run as a 1x1 convolution, which every library does at full speed.

    With a margin, a window lists the 9 pixels that each output pixel reads; for a 1x1 convolution that pixel alone.
    Without, the whole patch is one vector and so is the output: ``S**2 * C`` by ``S**2 * D`` numbers, of which none is
    multiplied by padding.
    """

    def __init__(self, weight: Tensor, side: int, margin: int) -> None:
        super().__init__(side, margin)
        self.out_channels = weight.shape[1]
        pixels_first = weight.permute(0, 1, 3, 4, 2)
        if margin == weight.shape[-1] // 2:
            self.spots, self.taps = side, weight.shape[-1]
        else:
            self.spots, self.taps = 1, side
            # Output pixel (i, j) sees input pixel (a, b) through the kernel's tap (a - i + 1, b - j + 1).
            near = [slice(1 - i, 1 - i + side) for i in range(side)]
            pixels_first = torch.cat([pixels_first[:, :, rows, columns] for rows in near for columns in near], dim=1)
        self.weight = pixels_first.flatten(2)[..., None, None]

    def _vectors(self, windows: Tensor, weight: Tensor) -> Tensor:
        return windows.reshape(1, -1, 1, weight.shape[1]).permute(0, 3, 1, 2)

    def _patches(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(-1, self.side, self.side, self.out_channels).permute(0, 3, 1, 2)

    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        """See `Kernel.apply`."""
        return self._patches(F.conv2d(self._vectors(windows, weight), weight).permute(0, 2, 3, 1))

    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        vectors = grad.permute(0, 2, 3, 1).reshape(1, -1, 1, len(weight)).permute(0, 3, 1, 2)
        for_windows, for_weight = _convolution_gradients(vectors, self._vectors(windows, weight), weight, 0, needed)
        return for_windows.permute(0, 2, 3, 1).reshape(windows.shape) if needed else for_windows, for_weight

    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        """See `PlainKernel.apply_blocks`."""
        vectors = windows.reshape(len(weight), -1, weight.shape[2])
        return self._patches(vectors @ weight[..., 0, 0].mT)


class WinogradKernel(Kernel):
    """Winograd's algorithm F(S x S, 3 x 3) with a patch as its tile: ``(S + 2)**2`` products for each pair of channels
    instead of ``9 * S**2`` (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015).

    ``y = A [(G w G') * (B x B')] A'`` on each patch x, ``*`` by elements and summed over channels: products of small
    constant matrices with the patches, and between them ``(S + 2)**2`` ordinary matrix products of patches by channels.
    Without margin a patch's surroundings are zeros, and the columns of B that would read them are left out.

    Its rounding errors are up to four times those of a direct convolution, so that it is for float32 and float64 alone.
    """

    def __init__(self, weight: Tensor, side: int, margin: int) -> None:
        super().__init__(side, margin)
        self.weight = weight
        self.spots, self.taps = 1, side + 2 * margin
        self._read, self._kernel, self._write = _patch_matrices(side, margin, weight.dtype, weight.device)

    def _chunks(self, count: int, weight: Tensor) -> list[slice]:
        """Stretches of patches whose transforms stay in the cache."""
        size = max(1, _CACHED_NUMBERS // (len(self._kernel) * max(weight.shape[:2])))
        return [slice(start, start + size) for start in range(0, count, size)] or [slice(0, 0)]

    def _transformed_weight(self, weight: Tensor) -> Tensor:
        """``[D, C, 3, 3]`` to ``[(S + 2)**2, D, C]``."""
        return torch.matmul(self._kernel, weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)

    def _transformed(self, windows: Tensor) -> Tensor:
        """``[n, cells, C]`` to ``[(S + 2)**2, n, C]``."""
        return torch.matmul(self._read, windows).transpose(0, 1)

    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        """See `Kernel.apply`."""
        kernel = self._transformed_weight(weight).mT
        parts = [
            torch.matmul(self._write, (self._transformed(windows[chunk]) @ kernel).transpose(0, 1))
            for chunk in self._chunks(len(windows), weight)
        ]
        pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
        return pixels.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)

    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        kernel = self._transformed_weight(weight)
        for_kernel: Tensor | None = None
        pixels = grad.permute(0, 2, 3, 1).flatten(1, 2)
        for_windows = torch.empty_like(windows)
        for chunk in self._chunks(len(windows), weight):
            for_products = torch.matmul(self._write.T, pixels[chunk]).transpose(0, 1)
            own = for_products.mT @ self._transformed(windows[chunk])
            for_kernel = own if for_kernel is None else for_kernel.add_(own)
            if needed:
                for_windows[chunk] = torch.matmul(self._read.T, (for_products @ kernel).transpose(0, 1))
        assert for_kernel is not None
        for_weight = torch.matmul(self._kernel.T, for_kernel.transpose(0, 1)).unflatten(1, (3, 3))
        return for_windows, for_weight.permute(0, 3, 1, 2)


# What may be transformed at a time: 4 MiB in float32, about a second-level cache.
_CACHED_NUMBERS = 2**20


@constant
def _patch_matrices(side: int, margin: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of `winograd_matrices` for both axes at once, acting on flattened patches."""
    read, kernel, write = winograd_matrices(side)
    if not margin:
        read = read[:, 1:-1]
    return (
        torch.kron(read, read).to(device, dtype),
        torch.kron(kernel, kernel).to(device, dtype),
        torch.kron(write, write).to(device, dtype),
    )


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


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, needed: bool
) -> tuple[Tensor, Tensor]:
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [needed, True, False]
    )
    return for_x, for_weight
