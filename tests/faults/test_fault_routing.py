"""Routing gone wrong: everything stays finite, repeatable, counted; a prediction does not depend on its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pcenet.models import create_network
from pcenet.nn import PCELayer, Routing, RoutingStatistics, aux_loss, record_routing

SIDE, EXPERTS = 2, 4


@dataclass(frozen=True)
class Case:
    """One degenerate routing.

    Attributes:
        biases: added to each expert's logit by the router's last layer, whose weights are zero; None: as initialised.
        images: in the batch, of 4 x 6 pixels: six patches each.
        capacity_factor: the layer's.
        load: patches of each expert, where it is known.
        kept: patches that are served.
    """

    biases: tuple[float, ...] | None
    images: int
    capacity_factor: float | None
    load: tuple[int, ...] | None
    kept: int
    size: tuple[int, int] = (4, 6)
    experts: int = EXPERTS


CASES = {
    "all patches to one expert": Case((0, 9, 0, 0), 2, None, (0, 12, 0, 0), 12),
    "all patches to one expert, with a capacity": Case((0, 9, 0, 0), 2, 1.25, (0, 12, 0, 0), 4),  # ceil(1.25 * 12 / 4)
    "an expert with none": Case((0, 0, 0, -999), 2, None, None, 12),
    "logits that saturate": Case((0, 1e4, 0, 0), 2, None, (0, 12, 0, 0), 12),
    "all logits equal": Case((0, 0, 0, 0), 2, 1.25, None, 4),  # whichever of the equals it is gets all
    "capacity 1": Case(None, 2, 0.01, None, -1),  # ceil(0.01 * 12 / 4) = 1: as many are kept as experts are chosen
    "fewer patches than experts": Case(None, 1, None, None, 6, experts=9),
    "one patch": Case(None, 1, 1.25, None, 1, size=(2, 2)),
    "a patch of one pixel": Case(None, 1, 1.25, None, 1, size=(1, 1)),
}


def make_layer(case: Case, **options: Any) -> PCELayer:
    torch.manual_seed(3)
    layer = PCELayer(
        3,
        3,
        patch_size=SIDE,
        num_experts=case.experts,
        capacity_factor=case.capacity_factor,
        balancing="none",
        dropout=0.1,
        **options,
    )
    if case.biases is not None:
        with torch.no_grad():
            layer.router.logits.weight.zero_()
            layer.router.logits.bias.copy_(torch.tensor(case.biases))
    return layer


def step(layer: PCELayer, images: Tensor) -> tuple[Tensor, Routing, list[Tensor]]:
    """Output, routing and all gradients of one step of training."""
    torch.manual_seed(11)
    layer.zero_grad(set_to_none=True)
    images = images.clone().requires_grad_()
    with record_routing(layer) as records:
        output, routing = layer.forward_with_routing(images)
        (output.square().mean() + aux_loss(records)).backward()
    assert images.grad is not None
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return output.detach(), routing, [images.grad, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("border", ["zero", "exchange"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.faults(f"routing: {name}")) for name in CASES])
def test_degenerate_routing_is_finite_repeatable_and_counted(name: str, border: str) -> None:
    case = CASES[name]
    images = torch.randn(case.images, 3, *case.size, generator=torch.Generator().manual_seed(5))
    layer = make_layer(case, border=border)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    output, routing, gradients = step(layer, images)
    for value in (output, *gradients, *layer.state_dict().values()):
        assert value.isfinite().all()
    if case.load is not None:
        assert tuple(routing.expert_counts.tolist()) == case.load
    patches = len(routing.logits)
    kept = case.kept if case.kept >= 0 else int((routing.expert_counts > 0).sum())
    assert int(routing.dispatch_mask.sum()) == kept
    statistics = RoutingStatistics()
    statistics.update(routing)
    assert statistics.compute().drop_rate == pytest.approx(1 - kept / patches)
    assert statistics.compute().dead == tuple(e for e, load in enumerate(routing.expert_counts.tolist()) if not load)
    layer.load_state_dict(state)
    again, _, gradients_again = step(layer, images)
    assert torch.equal(again, output)
    assert all(torch.equal(left, right) for left, right in zip(gradients, gradients_again, strict=True))
    assert layer.eval()(images).isfinite().all()


@pytest.mark.faults("routing: one expert gets everything, in a whole network")
def test_a_network_that_has_collapsed_still_trains() -> None:
    """With the balancing that networks have: it cannot tell patches apart whose logits are the same."""
    torch.manual_seed(0)
    model = create_network("pce_nano", num_classes=3, widths=[8, 8, 8], num_experts=3)
    for layer in (module for module in model.modules() if isinstance(module, PCELayer)):
        with torch.no_grad():
            layer.router.logits.weight.zero_()
            layer.router.logits.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    with record_routing(model) as records:
        loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 2]))
        (loss + aux_loss(records)).backward()
    assert loss.isfinite()
    assert len(records) == 2
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


MARGIN = 1e-4  # the design's: below it a patch may change its expert where kernels round differently


@pytest.mark.faults("a prediction that depends on its batch")
def test_a_prediction_is_the_same_alone_and_in_any_batch_in_any_order() -> None:
    torch.manual_seed(0)
    options = {"widths": [8, 8, 16], "num_experts": 3}
    model = create_network("pce_nano", num_classes=5, **options)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model(images)  # statistics and the balancing bias of a network that has been trained a little
    model.eval()
    with torch.no_grad(), record_routing(model) as records:
        together = model(images)
    margins = torch.full((12,), math.inf)
    for routings in records.values():
        for routing in routings:
            assert bool(routing.dispatch_mask.all())
            first, second = routing.logits.topk(2).values.unbind(1)
            margins = torch.minimum(margins, (first - second).view(12, -1).amin(1))
    close = [number for number, margin in enumerate(margins.tolist()) if margin < MARGIN]
    assert len(close) <= 2, f"images {close} have a router margin under {MARGIN:g}: too few are left to compare"
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = torch.empty_like(together)
        for part in order.split(5):
            shuffled[part] = model(images[part])
    for other, what in ((alone, "alone"), (shuffled, "in another batch")):
        differs = ((other - together).abs() > 1e-4 * together.abs().max()).any(1)
        wrong = [number for number in differs.nonzero().flatten().tolist() if number not in close]
        assert wrong == [], f"{what}: images {wrong} differ; named for their router margin: {close}"
