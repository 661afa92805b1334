"""Redirected patches, against layers whose experts are known."""

from __future__ import annotations

import torch
from torch import nn

from pcenet.analysis import random_expert, redirect
from pcenet.nn import PCELayer, record_routing


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
        with redirect(model, lambda _, routing: (routing.choice + 1) % 3), record_routing(model) as records:
            out = model(x)
        changed = records["0"][0]
        assert changed.choice.tolist() == [[(e + 1) % 3] for (e,) in routing.choice.tolist()]
        assert changed.load.tolist() == [routing.load.tolist()[(e - 1) % 3] for e in range(3)]
        experts = [layer.experts.to_sequential(e) for e in range(3)]
        patches = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        for i, patch in enumerate(patches):
            b, row, column = i // 4, i // 2 % 2, i % 2
            expert, weight = (int(routing.choice[i, 0]) + 1) % 3, routing.choice_weight[i, 0]
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
        loads.append(records["0"][0].load.tolist())
    assert loads[0] == loads[1]
    # 1,200 patches, binomial with p = 1/3: mean 400, standard deviation 16.3; five of them either side.
    assert all(abs(load - 400) < 82 for load in loads[0])
