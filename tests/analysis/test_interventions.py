"""Redirected patches, against layers whose experts are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pcenet.analysis import (
    fixed_expert,
    in_layer,
    knock_out,
    random_expert,
    redirect,
    removed_positions,
    second_choice,
    shuffled_positions,
)
from pcenet.analysis.interventions import patch_orders
from pcenet.nn import Grid, PatchExtractor, PCELayer, Routing, record_routing, route


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layer = PCELayer(4, 4, patch_size=4, num_experts=3, border="zero", shortcut=False).double().eval()
    return nn.Sequential(layer)


def test_the_expert_changes_and_the_weight_stays() -> None:
    model, x = network(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    layer = model[0]
    assert isinstance(layer, PCELayer)
    with torch.no_grad():
        _, routing = layer.forward_with_routing(x)
        with redirect(model, lambda _, routing: (routing.expert_ids + 1) % 3), record_routing(model) as records:
            out = model(x)
        changed = records["0"][0]
        assert changed.expert_ids.tolist() == [[(e + 1) % 3] for (e,) in routing.expert_ids.tolist()]
        assert changed.expert_counts.tolist() == [routing.expert_counts.tolist()[(e - 1) % 3] for e in range(3)]
        experts = [layer.experts.to_sequential(e) for e in range(3)]
        patches = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        for i, patch in enumerate(patches):
            b, row, column = i // 4, i // 2 % 2, i % 2
            expert, weight = (int(routing.expert_ids[i, 0]) + 1) % 3, routing.gates[i, 0]
            expected = weight * experts[expert](patch[None])[0]
            found = out[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(x), layer.forward_given_routing(x, routing), rtol=0, atol=0)


def test_random_experts_are_even_and_repeatable() -> None:
    model, x = network(), torch.randn(300, 4, 8, 8, dtype=torch.float64)
    loads = []
    for _ in range(2):
        with torch.no_grad(), redirect(model, random_expert(1)), record_routing(model) as records:
            model(x)
        loads.append(records["0"][0].expert_counts.tolist())
    assert loads[0] == loads[1]
    # 1,200 patches, binomial with p = 1/3: mean 400, standard deviation 16.3; five of them either side.
    assert all(abs(load - 400) < 82 for load in loads[0])


def table(**options: int) -> Routing:
    """Three patches whose experts' ranks are 0 1 2, 2 0 1 and 1 2 0."""
    return route(torch.tensor([[3.0, 2, 1], [2.0, 1, 3], [1.0, 3, 2]]), Grid(1, 1, 3), **options)


def test_choices_by_hand() -> None:
    assert fixed_expert(2)("", table()).tolist() == [[2], [2], [2]]
    assert second_choice("", table()).tolist() == [[1], [0], [2]]
    assert knock_out(0)("", table()).tolist() == [[1], [2], [1]]
    assert knock_out(2)("", table()).tolist() == [[0], [0], [1]]
    routing = table()
    assert in_layer("a", fixed_expert(2))("a", routing).tolist() == [[2], [2], [2]]
    assert in_layer("a", fixed_expert(2))("b", routing).tolist() == [[0], [2], [1]]


def test_choices_of_two_experts_by_hand() -> None:
    routing = table(top_k=2)
    assert second_choice("", routing).tolist() == [[1, 2], [0, 1], [2, 0]]
    assert knock_out(1)("", routing).tolist() == [[0, 2], [2, 0], [2, 0]]
    assert fixed_expert(1)("", routing).tolist() == [[1, 1]] * 3


def test_what_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="expert=3 must be one of the experts 0 to 2 of layer 'a'"):
        fixed_expert(3)("a", table())
    with pytest.raises(ValueError, match="expert=-1 must be"):
        knock_out(-1)("a", table())
    for choose in (second_choice, knock_out(0)):
        with pytest.raises(ValueError, match="all of them serve every patch"):
            choose("a", table(top_k=3))


def logits_by_hand(layer: PCELayer, patches: Tensor) -> Tensor:
    """The router's perceptron on enriched patches ``[N, C + 8K, S, S]``, with its bias for balance."""
    router = layer.router
    weight = router.hidden.weight[:, :, 0, 0]
    hidden = nn.functional.gelu(torch.einsum("hc,ncyx->nhyx", weight, patches) + router.hidden.bias[:, None, None])
    assert router.expert_bias is not None
    return router.logits(hidden.mean((2, 3))) + router.expert_bias


def routed_network() -> tuple[nn.Sequential, PCELayer]:
    model = network()
    layer = model[0]
    assert isinstance(layer, PCELayer)
    with torch.no_grad():
        assert layer.router.expert_bias is not None
        layer.router.expert_bias += torch.tensor([0.3, -0.2, 0.1])
    return model, layer


@torch.no_grad()
def test_shuffled_positions_change_the_position_that_routers_see_and_nothing_else() -> None:
    model, layer = routed_network()
    x = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    with shuffled_positions(3)(model), record_routing(model) as records:
        out = model(x)
    routing = records["0"][0]
    enriched = PatchExtractor(4)(x)
    order = patch_orders(routing.grid, (2, 3), torch.Generator().manual_seed(3))
    assert sorted(order[:6].tolist()) == list(range(6))
    assert sorted(order[6:].tolist()) == list(range(6, 12))
    assert order.tolist() != list(range(12))
    expected = enriched.clone()
    for place, content in enumerate(order.tolist()):
        expected[content, 4:] = enriched[place, 4:]
    torch.testing.assert_close(routing.logits, logits_by_hand(layer, expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(out, layer.forward_given_routing(x, routing), rtol=0, atol=0)
    torch.testing.assert_close(layer.router(x).logits, logits_by_hand(layer, enriched), rtol=0, atol=1e-10)


def test_patches_that_stick_out_keep_their_place() -> None:
    order = patch_orders(Grid(50, 2, 3), (1, 2), torch.Generator().manual_seed(0)).view(50, 6)
    local = order - 6 * torch.arange(50)[:, None]
    assert {tuple(image) for image in local[:, :2].tolist()} == {(0, 1), (1, 0)}
    assert local[:, 2:].tolist() == [[2, 3, 4, 5]] * 50


@torch.no_grad()
def test_removed_positions_leave_the_content_and_come_back() -> None:
    model, layer = routed_network()
    x = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    before = layer.router.hidden.weight.clone()
    enriched = PatchExtractor(4)(x)
    enriched[:, 4:] = 0
    with removed_positions(model):
        found = layer.router(x).logits
    torch.testing.assert_close(found, logits_by_hand(layer, enriched), rtol=0, atol=1e-10)
    assert torch.equal(layer.router.hidden.weight, before)
    with pytest.raises(KeyError), removed_positions(model):
        raise KeyError
    assert torch.equal(layer.router.hidden.weight, before)
