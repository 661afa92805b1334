"""Bodies of dense blocks with one part of what PCE has: a place that knows itself, or kernels mixed for each image.

They are controls: what a dense network gains by them is not due to experts that are chosen patch by patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import Tensor, nn

from pcenet.nn.stacked import NORM_EPS, NORM_MOMENTUM


class PositionMap(nn.Module):
    """Adds a learned map, zero at first and the same for every image, to its input.

    Args:
        channels: C.
        side: of the map, which is enlarged or reduced to that of the input, bilinearly.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(1, channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        if x.shape[2:] == self.map.shape[2:]:
            return x + self.map
        return x + F.interpolate(self.map, (x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)


class MixedConv2d(nn.Module):
    """A 3x3 convolution, padding 1, whose kernel is mixed for each image: CondConv (Yang et al., 2019), by timm.

    Args:
        channels: C, in and out.
        num_kernels: how many are mixed, by the sigmoids of a linear layer of the input's mean over the map.
    """

    def __init__(self, channels: int, num_kernels: int) -> None:
        super().__init__()
        self.mixing = nn.Linear(channels, num_kernels)
        self.kernels = CondConv2d(channels, channels, 3, padding=1, num_experts=num_kernels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        shares = self.mixing(x.mean((2, 3))).sigmoid()
        mixed: Tensor = self.kernels(x, shares.to(x.dtype))
        return mixed

    def multiply_adds(self, x: Tensor) -> int:
        """Of a map ``[B, C, H, W]``: mixing the kernels, and convolving with them."""
        weights = self.kernels.weight[0].numel()
        return x.shape[0] * weights * (self.kernels.num_experts + x.shape[2] * x.shape[3])


def mixed_double_conv(channels: int, num_kernels: int, dropout: float = 0.0) -> nn.Sequential:
    """`pcenet.nn.experts.double_conv` with kernels that are mixed for each image."""
    return nn.Sequential(
        MixedConv2d(channels, num_kernels),
        nn.BatchNorm2d(channels, NORM_EPS, NORM_MOMENTUM),
        nn.GELU(),
        nn.Dropout(dropout),
        MixedConv2d(channels, num_kernels),
        nn.BatchNorm2d(channels, NORM_EPS, NORM_MOMENTUM),
    )


def position_map_names(model: nn.Module) -> set[str]:
    """The learned maps of a network, which do not decay, as position embeddings do not."""
    return {f"{name}.map" for name, module in model.named_modules() if isinstance(module, PositionMap)}
