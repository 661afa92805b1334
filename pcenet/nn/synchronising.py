"""Preparing a network for training by several processes as if by one."""

from __future__ import annotations

from torch import nn

from pcenet.nn.routing import Router


def synchronise(model: nn.Module) -> nn.Module:
    """Let a network's routers see the batches of all processes in training.

    Do it before the network is wrapped, in every process. Each must then have a batch of the same size, and give
    ``synchronised=True`` to `aux_terms`. Capacity stays that of each process: none has to wait for who goes where.

    Batch normalisations, the experts' too, take the statistics of all processes after
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, or timm's, before or after this.

    Args:
        model: the network, changed in place.

    Returns:
        The network.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.synchronised = True
    return model
