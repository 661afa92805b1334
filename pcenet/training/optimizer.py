"""The optimiser of a run, and its parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW

from pcenet.nn.stacked import SharedConv2d
from pcenet.runs.config import TrainConfig


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
