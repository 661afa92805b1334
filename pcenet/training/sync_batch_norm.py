"""Batch normalisations and routers that see the batches of all processes."""

from __future__ import annotations

import torch
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from typing_extensions import override

from pcenet.nn import synchronise
from pcenet.nn.processes import sum_over_processes
from pcenet.runs.config import TrainConfig


def synchronised(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The network, changed in place, with routers that see the batches of all processes; statistics as the options say.

    Args:
        model: not wrapped yet.
        config: the options.
        device: where it will compute.
    """
    if config.sync_batch_norm:
        model = convert_sync_batchnorm(model)
    synchronise(model)
    if device.type == "cpu":
        layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
        for layer in layers:
            with_act = isinstance(layer, SyncBatchNormAct)
            layer.__class__ = ProcessorSyncBatchNormAct if with_act else ProcessorSyncBatchNorm
    return model


class ProcessorSyncBatchNorm(nn.BatchNorm2d):
    """torch's SyncBatchNorm computes on GPUs alone, and is refused elsewhere; this one computes on processors,
    maps of any number of axes."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, ...]`` to the same shape and type; statistics are taken in float32 at least."""
        assert self.running_mean is not None
        assert self.running_var is not None
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [0, *range(2, input.ndim)]
        per_channel = (-1, *(1 for _ in axes[1:]))
        mean, variance = self.running_mean, self.running_var
        if self.training:
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            count = sum_over_processes(values.new_tensor(input.numel() / input.shape[1]))
            mean = sum_over_processes(values.sum(axes)) / count
            variance = sum_over_processes((values - mean.view(per_channel)).square().sum(axes)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normalised = (values - mean.view(per_channel)) * torch.rsqrt(variance + self.eps).view(per_channel)
        if self.affine:
            normalised = normalised * self.weight.view(per_channel) + self.bias.view(per_channel)
        return normalised.to(input.dtype)


class ProcessorSyncBatchNormAct(ProcessorSyncBatchNorm):
    """timm's SyncBatchNormAct, on processors."""

    drop: nn.Module
    act: nn.Module

    @override
    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated
