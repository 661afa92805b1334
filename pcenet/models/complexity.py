"""What a network costs: parameters and multiply-adds, in all and active."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcenet.models.controls import MixedConv2d
from pcenet.nn import PCEConv2d, PCELayer, Router, Routing, routers_of
from pcenet.nn.conv import leaders_of
from pcenet.upcycling.survey import run


@dataclass(frozen=True)
class Complexity:
    """Cost of one image.

    Attributes:
        parameters: all of them, as they are trained and stored.
        active_parameters: those that one patch meets on its way: of E experts, k. (A kernel that the experts share is
            part of theirs by then.)
        multiply_adds: active ones, of convolutions, linear layers, experts and routers.
        router_multiply_adds: the routers' part of them.
        routed_multiply_adds: the experts' part of them.
    """

    parameters: int
    active_parameters: int
    multiply_adds: int
    router_multiply_adds: int
    routed_multiply_adds: int

    @property
    def router_share(self) -> float:
        """The routers' part of the multiply-adds, 0 to 1."""
        return self.router_multiply_adds / self.multiply_adds if self.multiply_adds else 0.0

    @property
    def routed_share(self) -> float:
        """The experts' part of the multiply-adds, 0 to 1."""
        return self.routed_multiply_adds / self.multiply_adds if self.multiply_adds else 0.0


def complexity(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Complexity:
    """Count the parameters and active multiply-adds of a network, with or without PCE layers.

    Nothing is counted as dropped; a patch that sticks out of the map counts whole, since it is computed whole; what the
    router computes once per grid counts once. A convolution counts as a direct one, however it is run. Normalisation,
    activation and pooling are not counted.

    Args:
        model: any network; it is run once on zeros, in evaluation mode, and left as it was.
        input_size: (C, H, W) of one image.
    """
    counts = {"dense": 0, "router": 0, "experts": 0}

    def count_dense(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Each weight is used once per output position of a convolution, once per row of a linear layer; a transposed
        # convolution uses it once per input position.
        positions = args[0] if isinstance(module, nn.ConvTranspose2d) else output
        channels = positions.shape[-1] if isinstance(module, nn.Linear) else positions.shape[1]
        counts["dense"] += weight.numel() * positions.numel() // channels

    def count_mixed(module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, MixedConv2d)
        counts["dense"] += module.multiply_adds(args[0])

    def counter_of(router: Router, weights: int) -> Callable[[nn.Module, tuple[Tensor, ...], Routing], None]:
        def count(_router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            counts["router"] += _router_multiply_adds(router, args[0], routing)
            counts["experts"] += routing.expert_ids.numel() * router.patch_size**2 * weights

        return count

    inactive = 0
    with ExitStack() as stack:
        counted_apart = {part for _, router in routers_of(model) for part in router.modules()}
        for module in set(model.modules()) - counted_apart:
            if isinstance(module, MixedConv2d):
                stack.callback(module.register_forward_hook(count_mixed).remove)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                stack.callback(module.register_forward_hook(count_dense).remove)
        leaders = leaders_of(model)
        for name, router in routers_of(model):
            layer = model.get_submodule(name)
            assert isinstance(layer, PCELayer | PCEConv2d)
            parts = [layer, *(follower for follower, leader in leaders.items() if leader is layer)]
            weights = sum(_kernel_weights(part) for part in parts)
            stack.callback(router.register_forward_hook(counter_of(router, weights)).remove)
            stored = [p for part in parts for p in _expert_parameters(part)]
            others = sum(p[0].numel() for p in stored if p.ndim == 2)  # of norms, and biases
            inactive += sum(p.numel() for p in stored) - (weights + others) * router.top_k
        reference = next(model.parameters(), torch.empty(0))
        image = torch.zeros(1, *input_size, device=reference.device, dtype=reference.dtype)
        run(model, (image,))
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(
        parameters=parameters,
        active_parameters=parameters - inactive,
        multiply_adds=sum(counts.values()),
        router_multiply_adds=counts["router"],
        routed_multiply_adds=counts["experts"],
    )


def _expert_parameters(layer: PCELayer | PCEConv2d) -> list[nn.Parameter]:
    if isinstance(layer, PCELayer):
        return list(layer.experts.parameters())
    return [*layer.kernels.parameters(), *([] if layer.bias is None else [layer.bias])]


def _kernel_weights(layer: PCELayer | PCEConv2d) -> int:
    """Of one expert's convolutions."""
    if isinstance(layer, PCEConv2d):
        return layer.kernels.weight[0].numel()
    return layer.experts.conv1.weight[0].numel() + layer.experts.conv2.weight[0].numel()


def _router_multiply_adds(router: Router, x: Tensor, routing: Routing) -> int:
    hidden = router.hidden.out_channels
    batch, rows, columns = routing.grid
    side, bands = router.patch_size, router.num_bands
    if router.gate_input != "flat":
        content = 0 if router.gate_input == "position" else batch * x.shape[1] * x.shape[2] * x.shape[3] * hidden
        position = (rows + columns) * side * 4 * bands * hidden
    else:
        content = routing.grid.patches * side**2 * router.hidden.in_channels * hidden
        position = 0  # part of it
    return content + position + routing.logits.numel() * hidden
