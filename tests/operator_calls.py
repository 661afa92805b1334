"""Arguments for every operator, as kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, H, W, C, D, E, S = 2, 5, 7, 5, 6, 3, 2
EXPERT = torch.arange(B * 3 * 4) % 4 - 1


def pixels(channels: int) -> Tensor:
    return torch.randn(B, H, W, channels)


def per_expert(channels: int) -> Tensor:
    return torch.randn(E, channels)


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, with what may be left out and without."""
    gate, weight, base = torch.randn(len(EXPERT)), torch.randn(E, D, C, 3, 3), torch.randn(D, C, 3, 3)
    sliced = torch.randn(E, D, 3, 3, C + 1).permute(0, 1, 4, 2, 3)[:, :, 1:]
    layer = (torch.randn(D, C + 4), torch.randn(D), torch.randn(H, 4), torch.randn(W, 4))
    norm, wide = [per_expert(D).abs() for _ in range(4)], torch.randn(E, C, D, 3, 3)
    last = [per_expert(C).abs() for _ in range(4)]
    none = (None, None, False, None, None)
    return {
        "patch_conv2d": [
            (pixels(C), weight, base, EXPERT, S, True, per_expert(D), per_expert(D), True, gate, pixels(D)),
            (pixels(C), sliced, None, EXPERT, S, False, *none),
            (pixels(C), torch.randn(E, D, C, 1, 1), None, EXPERT, S, True, *none),
            (pixels(C), weight, None, EXPERT, S, True, None, per_expert(D), False, gate, pixels(D)),
        ],
        "patch_conv2d_input_grad": [
            (pixels(D), weight, base, EXPERT, S, True),
            (pixels(D), sliced, None, EXPERT, S, False),
        ],
        "patch_conv2d_weight_grad": [
            (pixels(D), pixels(C), EXPERT, S, True, E, 3),
            (pixels(D), pixels(C), EXPERT, S, False, E, 1),
        ],
        "patch_affine": [
            (pixels(C), EXPERT, S, per_expert(C), per_expert(C), True, gate, pixels(C)),
            (pixels(C), EXPERT, S, *none),
            (pixels(C), EXPERT, S, None, per_expert(C), True, None, pixels(C)),
        ],
        "expert_moments": [(pixels(C), EXPERT, S, E)],
        "patch_affine_sums": [
            (pixels(C), pixels(C), EXPERT, S, E, per_expert(C), per_expert(C), True, gate, per_expert(C)),
            (pixels(C), pixels(C), EXPERT, S, E, *none),
        ],
        "patch_affine_input_grad": [
            (pixels(C), pixels(C), EXPERT, S, per_expert(C), per_expert(C), True, gate, per_expert(C), per_expert(C)),
            (pixels(C), pixels(C), EXPERT, S, *none, None),
        ],
        "balancing_bias": [(torch.randn(30, 4), 1, 8, 0.7), (torch.randn(30, 4), 2, 3, 0.5)],
        "expert_block": [
            (pixels(C), EXPERT, S, weight, base, norm, 1e-5, True, wide, None, last, 1e-3, False, gate, pixels(C)),
            (pixels(C), EXPERT, S, weight, None, norm, 1e-5, False, wide, None, last, 1e-5, True, None, None),
        ],
        "patch_perceptron": [(pixels(C), *layer, S)],
        "patch_logits": [
            (pixels(C), *layer, S, torch.randn(E, D), torch.randn(E), torch.randn(E), torch.tensor(0.6)),
            (pixels(C), *layer, S, torch.randn(E, D), torch.randn(E), None, None),
        ],
        "patch_perceptron_backward": [
            (torch.randn(len(EXPERT), D), pixels(C), *layer, S, True),
            (torch.randn(len(EXPERT), D), pixels(C), *layer, S, False),
        ],
    }
