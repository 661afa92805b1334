"""The moving average of a network's weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pcenet.training.engine import local_part


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a network, in evaluation mode, for the moving average of its weights and statistics.

    Args:
        model: the network.
        decay: see `update_average`.
    """
    averaged = AveragedModel(model, multi_avg_fn=partial(update_average, decay=decay), use_buffers=True)
    averaged.eval()
    return averaged


@torch.no_grad()
def update_average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int, decay: float) -> None:
    """One update in place of an exponential moving average; integers, such as counters, are taken over.

    Args:
        averaged: the averages so far, all of one type.
        current: what enters them, in the same order.
        count: updates so far, n. The decay is ``min(decay, (1 + n) / (10 + n))``, so that a short run does
            not end on its initial weights. Read once: on a GPU each reading waits for the device.
        decay: the average's weight in the long run.
    """
    if averaged[0].is_floating_point():
        n = int(count)
        averaged, current = ([local_part(tensor) for tensor in tensors] for tensors in (averaged, current))
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
    else:
        torch._foreach_copy_(averaged, current)
