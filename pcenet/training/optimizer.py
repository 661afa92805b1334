"""The optimiser of a run, its parameter groups, and the average of the weights that it leaves."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from pcenet.nn.experts import SharedConv2d
from pcenet.runs.config import TrainConfig
from pcenet.training.engine import local_part


def parameter_groups(
    model: nn.Module, weight_decay: float, difference_decay: float | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: biases, one-dimensional parameters and what ``no_weight_decay()`` lists do not decay.

    Experts are stacked, so a norm's scale has two dimensions ``[E, C]`` there: dimensions alone do not tell.

    Args:
        model: the network.
        weight_decay: of all others.
        difference_decay: of the experts' differences from their shared kernels; None: as the others.
    """
    listed: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=listed)
    if difference_decay is None:
        return groups
    differences = [m.difference for m in model.modules() if isinstance(m, SharedConv2d)]
    apart = {id(parameter) for parameter in differences}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
    return [*groups, {"params": differences, "weight_decay": difference_decay}] if differences else groups


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW with the parameters of a network, at the peak of the learning rate."""
    return AdamW(parameter_groups(model, config.weight_decay, config.difference_decay), lr=config.lr)


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
