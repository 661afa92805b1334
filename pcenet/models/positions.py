"""What a place of a map is known by: a learned value of its own, which every image has added there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionMap(nn.Module):
    """Adds a learned map, zero at first and the same for every image, to its input.

    Args:
        channels: C.
        side: height and width of the map; it is resized to the input's size by bilinear interpolation.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(1, channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        if x.shape[2:] == self.map.shape[2:]:
            return x + self.map
        return x + F.interpolate(self.map, (x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)


def position_map_names(model: nn.Module) -> set[str]:
    """The learned maps of a network, which do not decay, as position embeddings do not."""
    return {f"{name}.map" for name, module in model.named_modules() if isinstance(module, PositionMap)}
