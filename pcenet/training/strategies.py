"""How Lightning spreads the training of one network over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from typing_extensions import override

from pcenet.models.blocks import ResidualBlock
from pcenet.nn import synchronise
from pcenet.nn.processes import sum_over_processes
from pcenet.runs.config import TrainConfig
from pcenet.runtime.launcher import Ranks


def strategy_options(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """What Lightning's trainer is told of the processes; nothing but one device for a process alone."""
    if ranks.count == 1:
        return {"devices": 1}
    kind = Sharded if config.strategy == "fsdp" else DDPStrategy
    elastic = TorchElasticEnvironment.detect()
    environment: ClusterEnvironment = TorchElasticEnvironment() if elastic else Launched()
    return {
        "devices": ranks.local_count,
        "num_nodes": ranks.count // ranks.local_count,
        # Buffers are shared by the task: in validation processes need not have as many batches as each other.
        "strategy": kind(cluster_environment=environment, broadcast_buffers=False),
        "use_distributed_sampler": False,
    }


class Launched(LightningEnvironment):
    """Lightning's environment, of processes that `pcenet.runtime.launcher` has started."""

    @override
    def teardown(self) -> None:
        """Leaves the environment alone: what says that this is one of several processes still holds."""


class Sharded(DDPStrategy):
    """Fully sharded data parallel training, by torch's ``fully_shard``.

    Each process keeps its part of weights, gradients and the optimiser's state. A residual block's weights are whole
    while it computes. Checkpoints hold everything whole, as those of one process do.

    Lightning's ModelParallelStrategy loads a checkpoint into weights that are parts already, and its averaged weights
    stay whole; here everything is loaded whole, and then divided.
    """

    mesh: DeviceMesh

    @override
    def configure_ddp(self) -> None:
        """Divides the network in the place of wrapping it."""
        self.mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        assert self.model is not None
        self.divide(self.model)

    def divide(self, module: nn.Module) -> None:
        """Keep this process's part of each weight of a module alone."""
        module.to(memory_format=torch.contiguous_format)  # a part of another layout is none
        for block in [*(part for part in module.modules() if isinstance(part, ResidualBlock)), module]:
            fully_shard(block, mesh=self.mesh, shard_placement_fn=self.placement)

    def placement(self, parameter: nn.Parameter) -> Shard:
        """The axis along which a weight is divided: the first that gives all equal parts, else the first of all.

        The experts' axis, which comes first, is often shorter than there are processes.
        """
        even = [axis for axis, length in enumerate(parameter.shape) if length % self.world_size == 0]
        return Shard(even[0] if even else 0)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Gathers everything in the first process, tensor by tensor, which writes it."""
        whole = apply_to_collection(checkpoint, DTensor, self.gathered)
        super().save_checkpoint(whole, filepath, storage_options)

    def gathered(self, part: DTensor) -> Tensor | None:
        """A tensor as a whole in the first process's memory."""
        whole = part.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    @override
    def teardown(self) -> None:
        """Leaves the weights where they are: parts are not moved by moving the module."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keeps this process's part of each state."""
        states = []
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                index: {name: part_of(value, parameters[index]) for name, value in values.items()}
                for index, values in whole["state"].items()
            }
            states.append({**whole, "state": parts})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def local_part(tensor: Tensor) -> Tensor:
    """What a process keeps of a tensor, in the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(value: Any, parameter: Tensor) -> Any:
    """The part that a process keeps of what belongs to a parameter element by element; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device).contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def gather_weights(module: nn.Module) -> None:
    """Have whole weights until `release_weights`: processes may then call the module as often as each likes."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def release_weights(module: nn.Module) -> None:
    """Keep this process's part alone again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def synchronised(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The network, changed in place, with routers that see the batches of all processes; statistics as the options say.

    Args:
        model: not wrapped yet.
        config: the options.
        device: where it will compute.
    """
    if config.sync_batch_norm:
        model = convert_sync_batchnorm(model)
    model = synchronise(model, batch_norm=config.sync_batch_norm)
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
