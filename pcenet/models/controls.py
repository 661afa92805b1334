"""Bodies of dense blocks with one part of what PCE has, kernels that differ: here from image to image.

They are controls: what a dense network gains by them is not due to experts that are chosen patch by patch.
"""

from __future__ import annotations

from timm.layers import CondConv2d
from torch import Tensor, nn

from pcenet.nn.stacked import NORM_EPS, NORM_MOMENTUM


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
