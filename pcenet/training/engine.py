"""Lightning Fabric for a run: device, precision, processes; and networks whose weights are divided between these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pcenet.models.blocks import ResidualBlock
from pcenet.nn import PCEConv2d, Router
from pcenet.runs.config import TrainConfig
from pcenet.runtime.distributed import own_rank
from pcenet.runtime.launcher import Ranks


def launch(config: TrainConfig, device: torch.device, ranks: Ranks) -> Fabric:
    """Fabric for a run's device and processes, which have been started and know each other; precision is the loop's,
    which has to see gradients before and after they are scaled."""
    options: dict[str, Any] = {"devices": 1}
    if ranks.count > 1:
        elastic = TorchElasticEnvironment.detect()
        options = {
            "devices": ranks.local_count,
            "num_nodes": ranks.count // ranks.local_count,
            "strategy": make_strategy(config, ranks.count),
            "plugins": [TorchElasticEnvironment() if elastic else LightningEnvironment()],
        }
    fabric = Fabric(accelerator=device.type, **options)
    fabric.launch()
    return fabric


def make_strategy(config: TrainConfig, count: int) -> Strategy:
    """Every process has the whole network, or (``fsdp``) its part of each weight, gradient and optimiser state."""
    if config.strategy == "fsdp":
        return ModelParallelStrategy(divide, data_parallel_size=count, tensor_parallel_size=1)
    # The loop shares buffers: in validation processes need not have as many batches as each other.
    return DDPStrategy(broadcast_buffers=False)


def divide(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep this process's part of each weight alone; a residual block's weights are whole while it computes."""
    module.to(memory_format=torch.contiguous_format)  # a part of another layout is none
    for block in [*(part for part in module.modules() if isinstance(part, ResidualBlock)), module]:
        fully_shard(block, mesh=mesh["data_parallel"], shard_placement_fn=lambda weight: placement(weight, mesh.size()))
    return module


def placement(parameter: nn.Parameter, count: int) -> Shard:
    """The axis along which a weight is divided: the first that gives all equal parts, else the first of all.

    The experts' axis, which comes first, is often shorter than there are processes.
    """
    even = [axis for axis, length in enumerate(parameter.shape) if length % count == 0]
    return Shard(even[0] if even else 0)


def compile_parts(model: nn.Module) -> None:
    """Compile the largest parts of a network that have no router, all of a dense one: hooks note what routers do, and
    the graph of a compiled part calls none that come later."""
    import torch._dynamo.config as dynamo

    parts = list(parts_without_router(model))
    # All modules whose `forward` is torch's own count as one function, of which no more than this are compiled.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(parts))
    for part in parts:
        part.compile(dynamic=False)


def parts_without_router(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a network, none within another, that neither route nor follow another layer's router."""
    if not any(isinstance(part, Router | PCEConv2d) for part in module.modules()):
        called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if called and any(True for _ in module.parameters()):  # what has none has next to nothing to compute
            yield module
    elif not isinstance(module, Router | PCEConv2d):
        for part in module.children():
            yield from parts_without_router(part)


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


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """A state with each divided tensor gathered, one after the other, in the first process's memory; None elsewhere."""

    def gathered(part: DTensor) -> Tensor | None:
        tensor = part.full_tensor()
        return None if own_rank() else tensor.cpu()

    return dict(apply_to_collection(state, DTensor, gathered))


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
