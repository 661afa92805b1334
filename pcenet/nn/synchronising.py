"""Preparing a network for training by several processes as if by one."""

from __future__ import annotations

from torch import nn

from pcenet.nn.experts import StackedNorm
from pcenet.nn.layer import PCELayer
from pcenet.nn.routing import Router


def synchronise(model: nn.Module, batch_norm: bool = False) -> nn.Module:
    """Let a network's routers, and its batch statistics on demand, see the batches of all processes in training.

    Do it before the network is wrapped, in every process. Each must then have a batch of the same size, and give
    ``synchronised=True`` to `aux_terms`. Capacity stays that of each process: none has to wait for who goes where.

    Args:
        model: the network, changed in place.
        batch_norm: take the statistics of batch normalisation over all processes too, weighted by the values that each
            has: those of the experts, whose layers then use ``dispatch="static"``, one exchange for all experts instead
            of one for each; and those of ordinary layers, timm's with an activation among them, by
            `torch.nn.SyncBatchNorm`, which needs GPUs.

    Returns:
        The network; another module where it is itself an ordinary batch normalisation.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.synchronised = True
        elif batch_norm and isinstance(module, PCELayer) and module.experts.norm1.kind == "batch":
            module.dispatch = "static"
        elif batch_norm and isinstance(module, StackedNorm):
            module.synchronised = module.kind == "batch"
    if not batch_norm:
        return model
    from timm.layers import convert_sync_batchnorm  # here, since importing timm takes a second

    synchronised: nn.Module = convert_sync_batchnorm(model)
    return synchronised
