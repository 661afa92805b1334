"""What a layer allocates: nothing of the size of patches times experts; and activation checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pcenet.nn import Grid, PCELayer, route

# Few channels on maps of 64 x 64 pixels: the weights of 16 experts are small beside that.
CHANNELS, SIDE, BATCH = 4, 64, 2
FEW, MANY = 2, 16


class Allocations(TorchDispatchMode):
    """The numbers held by every tensor that an operator makes, views and results written in place left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and storage(t) not in given]
        self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in made]
        return out


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def allocations(num_experts: int, patch_size: int, border: str) -> list[int]:
    """Of a forward and a backward pass in which the experts share the patches equally."""
    layer = PCELayer(
        CHANNELS, CHANNELS, patch_size=patch_size, num_experts=num_experts, border=border, capacity_factor=None
    )
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    patches = SIDE // patch_size
    grid = Grid(BATCH, patches, patches)
    logits = 5 * torch.eye(num_experts)[torch.arange(grid.patches) % num_experts]
    with Allocations() as seen:
        layer.forward_given_routing(x, route(logits.requires_grad_(), grid)).sum().backward()
    return seen.sizes


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_neither_the_largest_tensor_nor_their_sum_grows_with_the_number_of_experts(
    patch_size: int, border: str
) -> None:
    """With 8 times the experts, one copy of the input for each would be 8 times as much."""
    few, many = allocations(FEW, patch_size, border), allocations(MANY, patch_size, border)
    a_map = BATCH * CHANNELS * SIDE * SIDE
    assert max(few) >= a_map, "the output is such a map"
    assert max(many) <= max(few)
    assert sum(many) <= 1.5 * sum(few)


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_the_router_makes_nothing_that_grows_with_the_number_of_experts(gate_input: str) -> None:
    """But the logits and what is made of them, ``[N, E]``, here far smaller than the map."""
    largest = {}
    for num_experts in (FEW, MANY):
        layer = PCELayer(CHANNELS, CHANNELS, patch_size=8, num_experts=num_experts, gate_input=gate_input)
        x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
        with Allocations() as seen:
            layer.router(x).gates.sum().backward()
        largest[num_experts] = max(seen.sizes)
    assert largest[MANY] == largest[FEW]


def test_allocations_are_seen() -> None:
    x = torch.randn(8, 3, requires_grad=True)
    one_hot = torch.eye(5)[torch.arange(8) % 5]
    with Allocations() as seen:
        x.detach().view(4, 6).t().add_(0)
        assert max(seen.sizes, default=0) == 0
        (one_hot[:, :, None] * x[:, None]).sum().backward()
    assert max(seen.sizes) == 8 * 5 * 3
    assert seen.sizes.count(8 * 5 * 3) >= 2, "in the forward pass and in the backward pass"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("border", "patch_size"), [("zero", 4), ("halo", 2), ("exchange", 3)])
def test_activation_checkpointing_changes_no_gradient(border: str, patch_size: int, use_reentrant: bool) -> None:
    layer = PCELayer(3, 4, patch_size=patch_size, num_experts=3, border=border)
    layer = reference.randomise(layer.double())
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    found = []
    for module, run in (
        (layer, layer),
        (twin, lambda x: checkpoint(twin, x, use_reentrant=use_reentrant)),
    ):
        own = x.clone().requires_grad_()
        y = run(own)
        (y * y.detach().cos()).sum().backward()
        found.append({"y": y, "x": own.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert all(tensor is not None for tensor in found[1].values())
    reference.assert_same(found[1], found[0], rtol=1e-12, atol=1e-12)
