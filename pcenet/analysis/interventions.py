"""Changing what the router decides or sees: the proof that its choice matters.

A `Redirect` says which experts serve the patches instead; `redirect` puts it into force. What a change costs is
measured in `pcenet.analysis.effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.nn import Router, Routing, routers_of
from pcenet.nn.patches import Grid, PatchExtractor
from pcenet.nn.stacked import check_stored

Redirect = Callable[[str, Routing], Tensor]
"""Layer name and its Routing to the experts ``[N, k]`` that serve the patches instead."""

Change = Callable[[nn.Module], AbstractContextManager[None]]
"""A context manager within which a network is changed."""


@contextmanager
def redirect(model: nn.Module, choose: Redirect) -> Iterator[None]:
    """Within it every PCE layer of the network serves its patches with other experts.

    The factors of the outputs stay those of the router's own choices: what changes is the expert alone, not how loudly
    it speaks. Nothing is dropped anew: a choice that was dropped stays dropped. A recorder entered inside sees the new
    routing.

    Args:
        model: the network.
        choose: for each layer and forward pass the experts, ``[N, k]`` int64.
    """
    with ExitStack() as stack:
        for name, router in routers_of(model):

            def change(_module: nn.Module, _args: Any, routing: Routing, name: str = name) -> Routing:
                return replace(routing, expert_ids=choose(name, routing))

            stack.callback(router.register_forward_hook(change).remove)
        yield


def in_layer(layer: str, choose: Redirect) -> Redirect:
    """``choose`` in the layer of that name alone; the others keep the router's choice."""
    return lambda name, routing: choose(name, routing) if name == layer else routing.expert_ids


def random_expert(seed: int = 0) -> Redirect:
    """Every choice becomes an expert drawn evenly from all E, the router's own among them.

    For k > 1 the k experts of a patch are drawn independently and may repeat.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(_name: str, routing: Routing) -> Tensor:
        shape = routing.expert_ids.shape
        return torch.randint(routing.num_experts, shape, generator=generator).to(routing.expert_ids.device)

    return choose


def fixed_expert(expert: int) -> Redirect:
    """One expert serves every patch; for k > 1 it does so k times over.

    Raises:
        ValueError: in a layer that has no such expert.
    """

    def choose(name: str, routing: Routing) -> Tensor:
        _check_expert(expert, name, routing)
        return torch.full_like(routing.expert_ids, expert)

    return choose


def second_choice(name: str, routing: Routing) -> Tensor:
    """The router's best expert is passed over: its second choice serves the patch (for k > 1 choices 2 to k + 1).

    Raises:
        ValueError: in a layer whose experts all serve every patch.
    """
    _check_spare(name, routing)
    return routing.logits.topk(routing.top_k + 1, dim=1).indices[:, 1:]


def knock_out(expert: int) -> Redirect:
    """One expert is out of order: a patch that it would serve goes to the router's next best, the others stay.

    Raises:
        ValueError: in a layer that has no such expert, or whose experts all serve every patch.
    """

    def choose(name: str, routing: Routing) -> Tensor:
        _check_expert(expert, name, routing)
        _check_spare(name, routing)
        logits = routing.logits.clone()
        logits[:, expert] = -torch.inf
        return logits.topk(routing.top_k, dim=1).indices

    return choose


def shuffled_positions(seed: int = 0) -> Change:
    """Routers see each patch with the absolute position of another patch of its image; experts see it as it is.

    The positions of an image's patches are permuted at random, for each image, layer and pass anew; patches that stick
    out of the map keep theirs. What is routed anew keeps the gate values that the router then gives.
    """
    generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def change(model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for _, router in routers_of(model):
                _shuffle_positions(router, generator, stack)
            yield

    return change


@contextmanager
def removed_positions(model: nn.Module) -> Iterator[None]:
    """Within it routers see no position: the weights of their position features are 0."""
    weights = []
    for _, router in routers_of(model):
        check_stored(router.hidden, "weight")
        weights.append(router.hidden.weight[:, router.in_channels :])
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        try:
            yield
        finally:
            for weight, values in zip(weights, saved, strict=True):
                weight.copy_(values)


def _shuffle_positions(router: Router, generator: torch.Generator, stack: ExitStack) -> None:
    """Let a router see the map with its patches permuted, and put its routing back into their order.

    Content j at the place of patch i is what content j with the position of i looks like to a router.
    """
    orders: list[Tensor] = []
    extractor = PatchExtractor(router.patch_size)

    def permute(_router: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        size = (x.shape[2], x.shape[3])
        patches, grid = extractor.split(x)
        whole = tuple(side // router.patch_size for side in size)
        order = patch_orders(grid, (whole[0], whole[1]), generator).to(x.device)
        orders.append(order)
        return (extractor.merge(patches[order], grid, size),)

    def restore(_router: nn.Module, _args: Any, routing: Routing) -> Routing:
        back = orders.pop().argsort()
        per_patch = ("logits", "probs", "expert_ids", "gates", "dispatch_mask")
        return replace(routing, **{name: getattr(routing, name)[back] for name in per_patch})

    stack.callback(router.register_forward_pre_hook(permute).remove)
    stack.callback(router.register_forward_hook(restore).remove)


def patch_orders(grid: Grid, whole: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``[N]`` int64: which patch comes to each place, for every image another permutation of its whole patches.

    Args:
        grid: how the patches lie.
        whole: rows and columns of patches that lie inside the map; others stay where they are.
        generator: where the numbers come from.
    """
    cells = torch.arange(grid.rows * grid.columns).view(grid.rows, grid.columns)
    movable = cells[: whole[0], : whole[1]].flatten()
    order = torch.arange(grid.patches).view(grid.batch, -1)
    for image in order:
        image[movable] = image[movable][torch.randperm(len(movable), generator=generator)]
    return order.flatten()


def _check_expert(expert: int, layer: str, routing: Routing) -> None:
    if not 0 <= expert < routing.num_experts:
        raise ValueError(
            f"expert={expert} must be one of the experts 0 to {routing.num_experts - 1} of layer {layer!r}"
        )


def _check_spare(layer: str, routing: Routing) -> None:
    if routing.top_k == routing.num_experts:
        raise ValueError(
            f"layer {layer!r} has {routing.num_experts} expert(s), and all of them serve every patch: none is left to "
            "take another's patches"
        )
