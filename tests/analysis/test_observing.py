"""Where a patch lies in the image."""

from __future__ import annotations

import torch
from torch import nn

from pcenet.analysis import observe
from pcenet.nn import PCELayer, record_routing


def test_boxes_in_pixels_of_the_image() -> None:
    # An image of 20 x 12, a map of 10 x 6: patches of 4 map pixels are 8 image pixels, the last ones are cut off.
    model = nn.Sequential(nn.AvgPool2d(2), PCELayer(3, 3, patch_size=4)).eval()
    with torch.no_grad(), observe(model) as seen, record_routing(model) as records:
        model(torch.rand(2, 3, 20, 12))
    layer = seen["1"]
    assert layer.routing is records["1"][0]
    assert (layer.patch_size, layer.map_size) == (4, (10, 6))
    assert layer.routing.grid == (2, 3, 2)
    assert not layer.divides
    assert layer.box(0, 0, (20, 12)) == (0, 0, 8, 8)
    assert layer.box(2, 1, (20, 12)) == (8, 16, 12, 20)


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = PCELayer(3, 3, patch_size=2), PCELayer(3, 3, patch_size=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(x))

    model = Backwards().eval()
    with torch.no_grad(), observe(model) as seen:
        model(torch.rand(1, 3, 8, 8))
    assert list(seen) == ["b", "a"]
    assert all(layer.divides for layer in seen.values())
