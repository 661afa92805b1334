"""Positions that blocks know, and dense networks whose kernels are mixed for each image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.models import complexity, create_network
from pcenet.models.blocks import make_blocks
from pcenet.models.controls import MixedConv2d
from pcenet.models.positions import PositionMap
from pcenet.models.stages import Stage, make_stages
from pcenet.nn import Router


def test_a_map_is_added_to_every_image() -> None:
    layer = PositionMap(2, 2)
    x = torch.randn(3, 2, 2, 2)
    assert torch.equal(layer(x), x)
    values = torch.arange(8.0).view(1, 2, 2, 2)
    layer.map.data.copy_(values)
    assert torch.equal(layer(x), x + values)
    (layer(x).sum() * 2).backward()
    assert torch.equal(layer.map.grad, torch.full((1, 2, 2, 2), 6.0))  # 2 from each of three images


def test_a_map_fits_any_image() -> None:
    """Two columns 0 and 4, enlarged to four whose centres lie at -1/4, 1/4, 3/4 and 5/4: 0, 1, 3 and 4."""
    layer = PositionMap(1, 2)
    layer.map.data.copy_(torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]]))
    found = layer(torch.zeros(1, 1, 3, 4))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(1, 1, 3, 4))


def naive_mixed(layer: MixedConv2d, x: Tensor) -> Tensor:
    """Image by image: the sum of the kernels, each times the sigmoid of its own line of the mean over the map."""
    outputs = []
    for image in x:
        mean = image.mean((1, 2))
        kernel = torch.zeros(x.shape[1], x.shape[1], 3, 3, dtype=x.dtype)
        for number in range(len(layer.mixing.bias)):
            share = torch.sigmoid(layer.mixing.weight[number] @ mean + layer.mixing.bias[number])
            kernel = kernel + share * layer.kernels.weight[number].view_as(kernel)
        outputs.append(F.conv2d(image[None], kernel, padding=1))
    return torch.cat(outputs)


def test_mixed_kernels_are_those_of_a_naive_loop() -> None:
    torch.manual_seed(0)
    layer, x = MixedConv2d(5, 3).double(), torch.randn(4, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 5, 6, 7, dtype=torch.float64)
    found = []
    for run in (layer, lambda x: naive_mixed(layer, x)):
        layer.zero_grad()
        x.grad = None
        output = run(x)
        (output * direction).sum().backward()
        found.append([output.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_costs_by_hand() -> None:
    twin, position, mixed = (
        complexity(create_network(name, num_classes=10), (3, 32, 32))
        for name in ("dense_nano", "dense_nano_position", "dense_nano_condconv")
    )
    assert position.multiply_adds == twin.multiply_adds
    assert position.parameters - twin.parameters == 48 * 16**2 + 96 * 8**2
    # On the way down and up again; the deepest stage is passed once.
    u_shaped = [complexity(create_network(f"dense_unet_nano{each}"), (3, 64, 64)) for each in ("", "_position")]
    assert u_shaped[1].parameters - u_shaped[0].parameters == (2 * 24 + 2 * 48 + 96) * 16**2
    # Two convolutions in each of two stages: three more kernels, four lines of C + 1; mixing reads all four kernels.
    kernels = {width: width * width * 9 for width in (48, 96)}
    assert mixed.parameters - twin.parameters == sum(2 * (3 * k + 4 * (width + 1)) for width, k in kernels.items())
    assert mixed.multiply_adds - twin.multiply_adds == sum(2 * 4 * (k + width) for width, k in kernels.items())


@pytest.mark.parametrize("routed", [True, False])
def test_a_block_reads_positions_and_passes_on_the_map_without_them(routed: bool) -> None:
    (block,) = make_blocks(
        Stage(1, 1, 4, 2 if routed else None, position_map=6), [0.0], 0.0, {"expert_width": 1.0} if routed else {}
    )
    block.double().eval()
    block.position.map.data.normal_()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), x + block.body(x + block.position.map), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(block(x), x + block.body(x))


@pytest.mark.parametrize("name", ["dense_nano", "dense_unet_nano"])
def test_with_maps_of_zeros_the_control_is_the_twin(name: str) -> None:
    twin, control = (create_network(each, num_classes=10).eval() for each in (name, f"{name}_position"))
    maps = {name: value for name, value in control.state_dict().items() if name.endswith(".map")}
    others = [name for name in control.state_dict() if name not in maps]
    control.load_state_dict(dict(zip(others, twin.state_dict().values(), strict=True)) | maps)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(control(x), twin(x))
    assert maps.keys() <= control.no_weight_decay()


def test_maps_do_not_decay_under_a_decoder_either() -> None:
    network = create_network("unet:dense_nano_position", num_classes=3)
    maps = {name for name, _ in network.named_parameters() if name.endswith("position.map")}
    assert maps
    assert maps <= network.no_weight_decay()


def test_a_router_of_positions_knows_no_content() -> None:
    torch.manual_seed(0)
    router = Router(6, 2, 4, gate_input="position")
    assert {name for name, _ in router.named_parameters()} == {name for name, _ in Router(6, 2, 4).named_parameters()}
    for training in (True, False):
        router.train(training)
        routing = router(torch.randn(3, 6, 8, 8))
        logits = routing.logits.view(3, 16, 4)
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
        assert logits[0].std(0).min() > 0  # places differ
    torch.testing.assert_close(router.eval()(torch.zeros(3, 6, 8, 8)).logits, routing.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_kernels": (4, None)}, "mixed_kernels of stage 0 has no effect on a routed stage"),
        ({"mixed_kernels": (None, 0)}, "mixed_kernels of stage 1 is 0; it must be a whole number and at least 1"),
        ({"mixed_kernels": (None, 4, 4)}, "must have one entry per stage"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, tuple[int | None, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stages((1, 2), (1, 1), (8, 8), (4, None), **options)
