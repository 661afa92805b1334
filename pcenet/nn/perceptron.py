"""The two layers of the router's perceptron, ``W2 gelu(W1 x + b1) + b2`` on the enriched patch.

Both compute in the type of their input, which the router makes float32 at least, whatever type their weights have.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.nn.fourier import position_lines
from pcenet.nn.patches import PatchExtractor
from pcenet.ops import patch_perceptron

GateInput = Literal["pixels", "flat", "position"]


class HiddenLayer(nn.Module):
    """``gelu(W1 x + b1)``, from a map ``[B, C, H, W]`` to patches ``[N, hidden]``.

    What it sees is what `PatchExtractor` makes of the map. For ``"pixels"`` that is never built: W1 is split into its
    part for the content and its part for the position, which is a line for each axis and the same for every image. So
    this is no convolution that a tool may replace by another one, though its weight has the shape of one.

    Args:
        in_channels: C, channels of the map.
        out_channels: width of the layer.
        patch_size: S.
        num_bands: K, bands of the position features.
        gate_input: ``"pixels"``: the layer is applied to every enriched pixel and averaged over the patch's real
            pixels; ``"flat"``: to the whole enriched patch, flattened; ``"position"``: as ``"pixels"``, with zeros in
            the content's place.

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
        self.extractor = PatchExtractor(patch_size, num_bands)
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
        x, weight, bias = x.to(dtype), self.weight.to(dtype).flatten(1), self.bias.to(dtype)
        if self.gate_input == "flat":
            return F.gelu(F.linear(self.extractor(x).flatten(1), weight, bias))
        return patch_perceptron(self.seen(x), weight, bias, *self.lines(x), self.patch_size)

    def seen(self, x: Tensor) -> Tensor:
        """What the layer sees of a map's content."""
        return torch.zeros_like(x) if self.gate_input == "position" else x

    def lines(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the rows ``[H, 8K]`` and columns ``[W, 8K]`` of a map, in its type."""
        size = (x.shape[2], x.shape[3])
        return position_lines(*size, self.patch_size, self.num_bands, dtype=x.dtype, device=x.device)

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
