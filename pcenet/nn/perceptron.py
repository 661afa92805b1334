"""The two layers of the router's perceptron, ``W2 gelu(W1 x + b1) + b2`` on the enriched patch (design, section 1).

Both compute in the type of their input, which the router makes float32 at least, whatever type their weights have.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn.fourier import axis_features, position_map
from pcenet.nn.patches import Grid, grid_of, split_map
from pcenet.nn.transforms import transforming

GateInput = Literal["pixels", "flat"]


class HiddenLayer(nn.Module):
    """``gelu(W1 x + b1)``, from a map ``[B, C, H, W]`` to patches ``[N, hidden]``.

    The enriched tensor is never built. W1 is split into its part for the content and its part for the position; the
    latter gives the same pre-activation for every image and is computed once per grid. So this is no convolution that a
    tool may replace by another one, though its weight has the shape of one.

    Args:
        in_channels: C, channels of the map.
        out_channels: width of the layer.
        patch_size: S.
        num_bands: K, bands of the position features.
        gate_input: ``"pixels"``: the layer is applied to every enriched pixel and averaged over the patch's real
            pixels; ``"flat"``: to the whole enriched patch, flattened.

    Attributes:
        weight: ``[hidden, C + 8K, k, k]``, k = 1 or, for a flat patch, S.
        bias: ``[hidden]``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, patch_size: int, num_bands: int, gate_input: GateInput
    ) -> None:
        super().__init__()
        self.content_channels = in_channels
        self.in_channels = in_channels + 8 * num_bands
        self.out_channels = out_channels
        self.patch_size = patch_size
        self.num_bands = num_bands
        self.gate_input = gate_input
        side = patch_size if gate_input == "flat" else 1
        self.weight = nn.Parameter(torch.empty(out_channels, self.in_channels, side, side))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights, like those of `torch.nn.Conv2d`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[N, hidden]``, in the wider of the types of input and weight."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        x, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        content, position = weight[:, : self.content_channels], weight[:, self.content_channels :]
        compute = self._from_pixels if self.gate_input == "pixels" else self._from_flat
        return compute(x, content, position, bias, grid_of(x, self.patch_size))

    def _from_pixels(
        self, x: Tensor, content_weight: Tensor, position_weight: Tensor, bias: Tensor, grid: Grid
    ) -> Tensor:
        height, width = x.shape[2:]
        # Position is a sum of a term of the row and one of the column, so a line of features per axis is enough.
        by_axis = position_weight[:, :, 0, 0].unflatten(1, (2, 2, 2 * self.num_bands))
        lines = []
        for axis, (cells, size) in enumerate(((grid.rows, height), (grid.columns, width))):
            absolute, relative = axis_features(cells, self.patch_size, self.num_bands, dtype=x.dtype, device=x.device)
            features = torch.cat((absolute[:size], relative[:size]), dim=1)
            lines.append(F.linear(features, by_axis[:, :, axis].flatten(1)))
        row, column = lines
        # Channels last, and so added: the gradient of the position is then a sum over images of contiguous maps.
        content = _project_pixels(x, content_weight[:, :, 0, 0], bias).permute(0, 2, 3, 1)
        pre_activation = content.add_(row[:, None] + column)
        if transforming():
            return _gelu_pool(pre_activation, self.patch_size)
        hidden: Tensor = _GeluPool.apply(pre_activation, self.patch_size)
        return hidden

    def _from_flat(
        self, x: Tensor, content_weight: Tensor, position_weight: Tensor, bias: Tensor, grid: Grid
    ) -> Tensor:
        hidden = _project_patches(x, content_weight, bias, self.patch_size)
        if self.num_bands:
            positions = position_map(
                grid.rows, grid.columns, self.patch_size, self.num_bands, dtype=x.dtype, device=x.device
            )
            position = _project_patches(positions, position_weight, None, self.patch_size)
            hidden = (hidden.unflatten(0, (grid.batch, -1)) + position).flatten(0, 1)
        return F.gelu(hidden)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the module's settings."""
        return (
            f"{self.content_channels} + {8 * self.num_bands}, {self.out_channels}, patch_size={self.patch_size}, "
            f"gate_input={self.gate_input!r}"
        )


class LogitsLayer(nn.Linear):
    """``W2 x + b2``, from ``[N, hidden]`` to ``[N, E]``: a linear layer that computes in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, hidden]`` to ``[N, E]``."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def _gelu_pool(x: Tensor, patch_size: int) -> Tensor:
    """GELU, then the mean over each patch's pixels: ``[B, H, W, C]`` to ``[N, C]``."""
    # With ceil_mode a window that leaves the map is averaged over the pixels it has: padding never counts.
    pooled = F.avg_pool2d(F.gelu(x).permute(0, 3, 1, 2), patch_size, ceil_mode=True)
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


class _GeluPool(torch.autograd.Function):
    """`_gelu_pool`, of which what lies between is not kept.

    The gradient is written out for another reason, too: with ``ceil_mode`` inductor gets it wrong (docs/log.md).
    """

    @staticmethod
    def forward(x: Tensor, patch_size: int) -> Tensor:
        return _gelu_pool(x, patch_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.patch_size = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,), side = ctx.saved_tensors, ctx.patch_size
        batch, height, width, channels = x.shape
        rows, columns = (
            (size - torch.arange(0, size, side, device=x.device)).clamp_(max=side) for size in (height, width)
        )
        share = grad.view(batch, len(rows), len(columns), channels) / (rows[:, None] * columns)[:, :, None]
        spread = share[:, :, None, :, None].expand(-1, -1, side, -1, side, -1)
        spread = spread.reshape(batch, len(rows) * side, len(columns) * side, channels)[:, :height, :width]
        return torch.ops.aten.gelu_backward(spread, x), None


def _project_pixels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, hidden, H, W]``, each pixel by itself, in the full precision of its type."""
    if x.device.type == "cpu":  # a 1x1 convolution takes half the time of a matrix product there
        return F.conv2d(x, weight[:, :, None, None], bias)
    # On recent GPUs torch runs float32 convolutions in TF32, 10 bits of mantissa; matrix products it does not.
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _project_patches(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int) -> Tensor:
    """``[B, C, H, W]`` to ``[N, hidden]``, each flattened patch by itself; weight ``[hidden, C, S, S]``."""
    patches, _ = split_map(x, patch_size)
    return F.linear(patches.permute(0, 2, 3, 1).flatten(1), weight.permute(0, 2, 3, 1).flatten(1), bias)
