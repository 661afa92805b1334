"""How an expert's 3x3 convolution runs on a batch of patches: as a convolution, or as a matrix product.

Axes: n patches, S patch side, m margin (pixels of a patch's surroundings that are read: 0 or 1), C channels in, D
channels out, G blocks of b patches each. What a patch's convolution reads comes as a window ``[cells, C]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this side a patch is multiplied instead of convolved: a kernel of 3x3 sees so little of it that the libraries'
# convolutions fall to a third of their speed and less (docs/performance.md).
MATRIX_SIDE = 2


class Kernel(ABC):
    """E convolutions 3x3 in the form in which they are run.

    A window lists, for patch (r, c) of the grid, the pixels ``r * S + spot + tap - m`` by ``c * S + spot + tap - m``
    in the order row spot, column spot, row tap, column tap.

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

    @abstractmethod
    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        """Windows ``[n, cells, C]`` through one expert's weight: patches ``[n, D, S, S]``, channels-last."""

    @abstractmethod
    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        """The gradients of `apply` for the windows (only where ``needed``; else undefined) and for the weight."""

    @abstractmethod
    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        """Windows ``[G * b, cells, C]`` through G weights ``[G, ...]``, one for each block."""


def make_kernel(weight: Tensor, side: int, margin: int) -> Kernel:
    """The faster form of convolutions ``[E, D, C, 3, 3]`` on patches of a side."""
    return MatrixKernel(weight, side, margin) if side <= MATRIX_SIDE else WindowKernel(weight, side, margin)


class WindowKernel(Kernel):
    """A convolution on windows of S + 2m pixels a side; without margin it pads with zeros."""

    def __init__(self, weight: Tensor, side: int, margin: int) -> None:
        super().__init__(side, margin)
        self.weight = weight
        self.spots, self.taps = 1, side + 2 * margin
        self.padding = 1 - margin

    def _maps(self, windows: Tensor) -> Tensor:
        return windows.unflatten(1, (self.taps, self.taps)).permute(0, 3, 1, 2)

    def apply(self, windows: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(self._maps(windows), weight, padding=self.padding)

    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        for_maps, for_weight = _convolution_gradients(grad, self._maps(windows), weight, self.padding, needed)
        return for_maps.permute(0, 2, 3, 1).flatten(1, 2) if needed else for_maps, for_weight

    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        # One grouped convolution: group g of the channels is convolved with block g's kernel.
        blocks = len(weight)
        grouped = self._maps(windows).unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1, 2)
        out = F.conv2d(grouped, weight.flatten(0, 1), padding=self.padding, groups=blocks)
        return out.unflatten(1, (blocks, -1)).transpose(0, 1).flatten(0, 1)


class MatrixKernel(Kernel):
    """A matrix product, run as a 1x1 convolution, which every library does at full speed.

    With a margin, a window lists the 9 pixels that each output pixel reads. Without, the whole patch is one vector and
    so is the output: ``S**2 * C`` by ``S**2 * D`` numbers, of which none is multiplied by padding.
    """

    def __init__(self, weight: Tensor, side: int, margin: int) -> None:
        super().__init__(side, margin)
        self.out_channels = weight.shape[1]
        pixels_first = weight.permute(0, 1, 3, 4, 2)
        if margin:
            self.spots, self.taps = side, 3
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
        return self._patches(F.conv2d(self._vectors(windows, weight), weight).permute(0, 2, 3, 1))

    def gradients(self, windows: Tensor, weight: Tensor, grad: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
        vectors = grad.permute(0, 2, 3, 1).reshape(1, -1, 1, len(weight)).permute(0, 3, 1, 2)
        for_windows, for_weight = _convolution_gradients(vectors, self._vectors(windows, weight), weight, 0, needed)
        return for_windows.permute(0, 2, 3, 1).reshape(windows.shape) if needed else for_windows, for_weight

    def apply_blocks(self, windows: Tensor, weight: Tensor) -> Tensor:
        vectors = windows.reshape(len(weight), -1, weight.shape[2])
        return self._patches(vectors @ weight[..., 0, 0].mT)


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, needed: bool
) -> tuple[Tensor, Tensor]:
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [needed, True, False]
    )
    return for_x, for_weight
