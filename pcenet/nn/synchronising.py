"""Preparing a network for training by several processes as if by one."""

from __future__ import annotations

from torch import nn

from pcenet.nn.routing import Router
from pcenet.nn.stacked import StackedBatchNorm

ORDINARY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise(model: nn.Module, batch_norm: bool = False) -> nn.Module:
    """Let a network's routers, and its batch statistics on demand, see the batches of all processes in training.

    Do it before the network is wrapped, in every process. Each must then have a batch of the same size, and give
    ``synchronised=True`` to `aux_terms`. Capacity stays that of each process: none has to wait for who goes where.

    Args:
        model: the network, changed in place.
        batch_norm: take the statistics of batch normalisation over all processes too, weighted by the values that each
            has: those of the experts, in one exchange for all of a layer's experts; and those of ordinary layers, by
            `torch.nn.SyncBatchNorm`, which needs GPUs. (`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does the same,
            but for the routers.)

    Returns:
        The network; another module where it is itself an ordinary batch normalisation.

    Raises:
        ValueError: for a batch normalisation that does more than torch's, which that would lose.
    """
    if batch_norm:
        _check_ordinary(model)
    for module in model.modules():
        if isinstance(module, Router) or (batch_norm and isinstance(module, StackedBatchNorm)):
            module.synchronised = True
    return _convert(model) if batch_norm else model


def _convert(module: nn.Module) -> nn.Module:
    """As `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, but for what is synchronised already: that stays."""
    if type(module) in ORDINARY:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        module.add_module(name, _convert(child))
    return module


def _check_ordinary(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ORDINARY) and type(module) not in (*ORDINARY, StackedBatchNorm):
            raise ValueError(
                f"batch_norm: {name or 'the network'} is a {type(module).__name__}, and torch.nn.SyncBatchNorm would"
                " lose what it does beside normalising; convert it before, timm's by timm.layers.convert_sync_batchnorm"
            )
