"""Agreement of two routings by hand, and where a patch lies in a mirrored image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcenet.analysis import AgreementStatistics, observe
from pcenet.analysis.agreement import VIEWS, Pixels, first_choices, mirror, recolour
from pcenet.nn import Grid, PCELayer, route

RECOLOURED, MIRRORED = VIEWS


def test_rate_and_chance_by_hand() -> None:
    statistics = AgreementStatistics(3)
    statistics.update(torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0, 1], [1, 2]]))
    statistics.update(torch.tensor([0]), torch.tensor([0]))
    found = statistics.compute()
    # Pairs 00, 01, 11, 22, 00: four of five agree. Loads 3/5, 1/5, 1/5 and 2/5, 2/5, 1/5.
    assert found.rate == pytest.approx(4 / 5)
    assert found.chance == pytest.approx(3 / 5 * 2 / 5 + 1 / 5 * 2 / 5 + 1 / 5 * 1 / 5)
    with pytest.raises(ValueError, match="no patch was compared"):
        AgreementStatistics(2).compute()


class ByLeftEdge(nn.Module):
    """Routes each patch of 2 x 2 by the red of its left upper pixel."""

    patch_size = 2

    def forward(self, x: torch.Tensor) -> object:
        red = x[:, 0, ::2, ::2]
        experts = red.flatten().long()
        return route(nn.functional.one_hot(experts, 3).float(), Grid(len(x), *red.shape[1:]))


def layer_by_colour() -> PCELayer:
    layer = PCELayer(3, 3, patch_size=2, num_experts=3).eval()
    layer.router = ByLeftEdge()
    return layer


def test_a_mirrored_map_is_mirrored_back() -> None:
    layer = layer_by_colour()
    image = torch.zeros(1, 3, 2, 6)
    image[0, 0] = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad(), observe(layer) as seen:
        layer(image)
        straight = first_choices(seen[""])
        layer(mirror(image))
    assert straight is not None
    assert straight.tolist() == [[[0, 1, 2]]]
    assert seen[""].routing.expert_ids[:, 0].tolist() == [2, 1, 0]
    back = first_choices(seen[""], MIRRORED)
    assert back is not None
    assert back.tolist() == [[[0, 1, 2]]]


def test_padding_leaves_no_place_in_a_mirrored_map() -> None:
    layer = layer_by_colour()
    with torch.no_grad(), observe(layer) as seen:
        layer(torch.zeros(1, 3, 2, 5))
    assert first_choices(seen[""], MIRRORED) is None
    assert first_choices(seen[""], RECOLOURED) is not None


def test_recolouring_moves_nothing() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, :, 1, 2] = torch.tensor([0.4, 0.2, 0.2])
    changed = recolour(image)
    assert changed.sum(1).nonzero().tolist() == [[0, 1, 2]]
    red, green, blue = changed[0, :, 1, 2].tolist()
    # Brighter by 1.25: 0.5, 0.25, 0.25; grey 0.299 * 0.5 + 0.701 * 0.25 = 0.32475; 0.6 of the way from grey.
    assert red == pytest.approx(0.32475 + 0.6 * (0.5 - 0.32475), abs=1e-3)
    assert green == pytest.approx(0.32475 + 0.6 * (0.25 - 0.32475), abs=1e-3)
    assert blue == pytest.approx(green)


def test_pixels_and_inputs() -> None:
    pixels = Pixels(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    inputs = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
    assert pixels.of(inputs).flatten().tolist() == [1.0, 0.0, 0.5]
    assert pixels.inputs(pixels.of(inputs)).flatten().tolist() == [1.0, -1.0, 0.5]
    assert pixels.of(inputs * 3).flatten().tolist() == [1.0, 0.0, 1.0]
