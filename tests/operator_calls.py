"""Arguments for every operator, as kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, H, W, C, D, E, S = 2, 5, 7, 5, 6, 3, 2
EXPERT = torch.arange(B * 3 * 4) % 4 - 1


def per_expert(channels: int) -> Tensor:
    return torch.randn(E, channels)


def calls(
    channels: int = C, maps: torch.dtype = torch.float32, others: torch.dtype = torch.float32
) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, with what may be left out and without.

    Args:
        channels: of the maps.
        maps: their type; the router's are in float32.
        others: the type of what belongs to a map, its residual or the gradient of what an affine map makes of it.
    """

    def pixels(number: int, dtype: torch.dtype = maps) -> Tensor:
        return torch.randn(B, H, W, number).to(dtype)

    other, residual = pixels(channels, others), pixels(D, others)
    tables = (per_expert(channels), per_expert(channels))
    gate, weight, base = torch.randn(len(EXPERT)), torch.randn(E, D, channels, 3, 3), torch.randn(D, channels, 3, 3)
    sliced = torch.randn(E, D, 3, 3, channels + 1).permute(0, 1, 4, 2, 3)[:, :, 1:]
    layer = (torch.randn(D, channels + 4), torch.randn(D), torch.randn(H, 4), torch.randn(W, 4))
    seen, block = (pixels(channels, torch.float32), *layer), (pixels(channels), EXPERT, S, weight)
    norm, wide = [per_expert(D).abs() for _ in range(4)], torch.randn(E, channels, D, 3, 3)
    last = [per_expert(channels).abs() for _ in range(4)]
    none = (None, None, False, None, None)
    return {
        "patch_conv2d": [
            (pixels(channels), weight, base, EXPERT, S, True, per_expert(D), per_expert(D), True, gate, residual),
            (pixels(channels), sliced, None, EXPERT, S, False, *none),
            (pixels(channels), torch.randn(E, D, channels, 1, 1), None, EXPERT, S, True, *none),
            (pixels(channels), weight, None, EXPERT, S, True, None, per_expert(D), False, gate, residual),
        ],
        "patch_conv2d_input_grad": [
            (pixels(D), weight, base, EXPERT, S, True),
            (pixels(D), sliced, None, EXPERT, S, False),
        ],
        "patch_conv2d_weight_grad": [
            (pixels(D), pixels(channels), EXPERT, S, True, E, 3),
            (pixels(D), pixels(channels), EXPERT, S, False, E, 1),
        ],
        "patch_affine": [
            (pixels(channels), EXPERT, S, *tables, True, gate, other),
            (pixels(channels), EXPERT, S, *none),
            (pixels(channels), EXPERT, S, None, per_expert(channels), True, None, other),
        ],
        "expert_moments": [(pixels(channels), EXPERT, S, E)],
        "patch_affine_sums": [
            (other, pixels(channels), EXPERT, S, E, *tables, True, gate, per_expert(channels)),
            (other, pixels(channels), EXPERT, S, E, *none),
        ],
        "patch_affine_input_grad": [
            (other, pixels(channels), EXPERT, S, *tables, True, gate, *tables),
            (other, pixels(channels), EXPERT, S, *none, None),
        ],
        "balancing_bias": [(torch.randn(30, 4), 1, 8, 0.7), (torch.randn(30, 4), 2, 3, 0.5)],
        "expert_block": [
            (*block, base, norm, 1e-5, True, wide, None, last, 1e-3, False, gate, other),
            (*block, None, norm, 1e-5, False, wide, None, last, 1e-5, True, None, None),
        ],
        "patch_perceptron": [(*seen, S)],
        "patch_logits": [
            (*seen, S, torch.randn(E, D), torch.randn(E), torch.randn(E), torch.tensor(0.6)),
            (*seen, S, torch.randn(E, D), torch.randn(E), None, None),
        ],
        "patch_perceptron_backward": [
            (torch.randn(len(EXPERT), D), *seen, S, True),
            (torch.randn(len(EXPERT), D), *seen, S, False),
        ],
    }
