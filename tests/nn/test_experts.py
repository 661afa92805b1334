"""Stacked experts as ordinary modules and back, and layers against those modules."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pcenet.nn import ConvExperts, Grid, PatchExtractor, PCELayer, route
from pcenet.nn.stacked import StackedBatchNorm


def random_experts(*args: int, **options: Any) -> ConvExperts:
    return reference.randomise(ConvExperts(*args, **options).double())


def routed_layer(choice: list[int], grid: Grid, **options: Any) -> tuple[PCELayer, Any]:
    """A layer without shortcut, and the routing that sends patch i to expert choice[i] with weight 1."""
    layer = PCELayer(3, 4, patch_size=3, num_experts=3, hidden_channels=5, shortcut=False, **options)
    logits = F.one_hot(torch.tensor(choice), 3).to(torch.float64)
    return reference.randomise(layer.double()), route(logits, grid, gate="straight_through")


# Modules


def test_parameters_are_stacked_by_expert() -> None:
    experts = ConvExperts(3, 8, 5, hidden_channels=6)
    shapes = {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()}
    assert shapes == {
        "conv1.weight": (5, 6, 3, 3, 3),
        "norm1.weight": (5, 6),
        "norm1.bias": (5, 6),
        "norm1.running_mean": (5, 6),
        "norm1.running_var": (5, 6),
        "norm1.num_batches_tracked": (5,),
        "conv2.weight": (5, 8, 6, 3, 3),
        "norm2.weight": (5, 8),
        "norm2.bias": (5, 8),
        "norm2.running_mean": (5, 8),
        "norm2.running_var": (5, 8),
        "norm2.num_batches_tracked": (5,),
    }
    assert ConvExperts(3, 8, 5).conv1.weight.shape == (5, 8, 3, 3, 3), "hidden is out by default"


def test_experts_start_apart_with_the_spread_of_a_plain_convolution() -> None:
    weight = ConvExperts(16, 32, 4).conv1.weight
    bound = (16 * 9) ** -0.5  # nn.Conv2d: uniform within 1 / sqrt(fan_in)
    for e in range(4):
        assert weight[e].abs().max() <= bound
        assert weight[e].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not any(torch.equal(weight[e], weight[other]) for other in range(e))


def test_to_sequential_is_the_block_of_the_design() -> None:
    experts = random_experts(3, 12, 2, hidden_channels=6, dropout=0.25)
    block = experts.to_sequential(1)
    assert [type(m) for m in block] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.GELU,
        nn.Dropout,
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    conv1, norm1, gelu, dropout, conv2, norm2 = block
    assert (conv1.in_channels, conv1.out_channels, conv2.out_channels) == (3, 6, 12)
    for conv in (conv1, conv2):
        assert (conv.kernel_size, conv.padding, conv.stride, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert (gelu.approximate, dropout.p) == ("none", 0.25)
    assert norm1.eps == norm2.eps == 1e-5
    assert norm1.momentum == norm2.momentum == 0.1
    assert torch.equal(norm1.running_mean, experts.norm1.running_mean[1])
    assert torch.equal(norm2.running_var, experts.norm2.running_var[1])
    assert torch.equal(conv1.weight, experts.conv1.weight[1])
    assert torch.equal(conv2.weight, experts.conv2.weight[1])
    assert torch.equal(norm1.weight, experts.norm1.weight[1])
    assert torch.equal(norm2.bias, experts.norm2.bias[1])
    assert conv1.weight.dtype == torch.float64


def test_experts_that_share_a_kernel() -> None:
    experts = ConvExperts(16, 32, 3, hidden_channels=8, shared_kernel=True)
    assert {name: tuple(p.shape) for name, p in experts.named_parameters() if "conv" in name} == {
        "conv1.shared": (8, 16, 3, 3),
        "conv1.difference": (3, 8, 16, 3, 3),
        "conv2.shared": (32, 8, 3, 3),
        "conv2.difference": (3, 32, 8, 3, 3),
    }
    bound = (16 * 9) ** -0.5
    assert experts.conv1.shared.abs().max() <= bound
    assert experts.conv1.shared.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not experts.conv1.difference.any(), "all start as the same expert"
    experts = reference.randomise(experts.double())
    for e in range(3):
        block = experts.to_sequential(e)
        torch.testing.assert_close(block[0].weight, experts.conv1.shared + experts.conv1.difference[e], rtol=0, atol=0)
        torch.testing.assert_close(block[4].weight, experts.conv2.shared + experts.conv2.difference[e], rtol=0, atol=0)


def test_a_shared_kernel_learns_from_all_patches_and_a_difference_from_its_own() -> None:
    experts = reference.randomise(ConvExperts(2, 3, 3, shared_kernel=True).double())
    direction = torch.randn(3, 3, 2, 3, 3, dtype=torch.float64)
    (experts.conv1.weight[:2] * direction[:2]).sum().backward()
    torch.testing.assert_close(experts.conv1.shared.grad, direction[0] + direction[1])
    torch.testing.assert_close(experts.conv1.difference.grad[:2], direction[:2])
    assert not experts.conv1.difference.grad[2].any()


def test_from_sequential_into_experts_that_share_a_kernel() -> None:
    experts = random_experts(3, 4, 3, shared_kernel=True)
    others = [experts.to_sequential(e).state_dict() for e in range(2)]
    block = random_experts(3, 4, 1).to_sequential(0)
    shared = experts.conv1.shared.clone()
    experts.from_sequential(2, block)
    reference.assert_same(experts.to_sequential(2).state_dict(), block.state_dict(), rtol=0, atol=1e-15)
    for e in range(2):
        reference.assert_same(experts.to_sequential(e).state_dict(), others[e], rtol=0, atol=0)
    assert torch.equal(experts.conv1.shared, shared)


@pytest.mark.parametrize("training", [True, False])
def test_to_sequential_keeps_the_mode(training: bool) -> None:
    block = random_experts(2, 2, 2).train(training).to_sequential(0)
    assert all(module.training is training for module in block.modules())


@pytest.mark.parametrize("drop", [nn.Identity(), nn.PReLU()])
def test_to_sequential_has_what_a_tool_put_in_the_place_of_dropout(drop: nn.Module) -> None:
    experts = random_experts(2, 2, 2)
    experts.drop = drop
    block = experts.to_sequential(1)
    assert type(block[3]) is type(drop)
    assert block[3] is not drop
    experts.from_sequential(0, block)
    reference.assert_same(experts.to_sequential(0).state_dict(), block.state_dict(), rtol=0, atol=1e-15)


def test_to_sequential_is_a_copy() -> None:
    experts = random_experts(3, 4, 2)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    block = experts.to_sequential(0)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in block.parameters())
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.add_(1)
    reference.assert_same(experts.state_dict(), before, rtol=0, atol=0)


def test_from_sequential_takes_a_block_into_one_expert() -> None:
    experts = random_experts(3, 4, 3)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    other = reference.randomise(ConvExperts(3, 4, 1).double(), seed=9).to_sequential(0)
    experts.from_sequential(2, other)
    reference.assert_same(experts.to_sequential(2).state_dict(), other.state_dict(), rtol=0, atol=0)
    after = experts.state_dict()
    assert not torch.equal(after["conv1.weight"][2], before["conv1.weight"][2])
    reference.assert_same({k: v[:2] for k, v in after.items()}, {k: v[:2] for k, v in before.items()}, 0, 0)
    with torch.no_grad():
        other[0].weight.zero_()
    assert experts.conv1.weight[2].abs().min() > 0, "taken by value"


def test_from_sequential_takes_a_block_that_counts_no_batches() -> None:
    """As torchvision's FrozenBatchNorm2d, whose state lacks ``num_batches_tracked``."""
    experts = ConvExperts(3, 4, 2)
    experts.norm1.num_batches_tracked[1] = 7
    block = experts.to_sequential(0)
    for place in (1, 5):
        block[place] = torchvision.ops.FrozenBatchNorm2d(4)
    block[1].running_mean.fill_(2.0)
    experts.from_sequential(1, block)
    assert torch.equal(experts.conv1()[1], block[0].weight)
    assert experts.norm1.running_mean[1].tolist() == [2.0] * 4
    assert experts.norm1.num_batches_tracked[1] == 7


def test_from_sequential_converts_the_dtype() -> None:
    experts = ConvExperts(3, 4, 2)
    block = random_experts(3, 4, 1).to_sequential(0)
    experts.from_sequential(0, block)
    torch.testing.assert_close(experts.conv1.weight[0], block[0].weight.float(), rtol=0, atol=0)


@pytest.mark.parametrize("expert", [-1, 2])
def test_an_expert_that_does_not_exist_is_named(expert: int) -> None:
    experts = ConvExperts(3, 4, 2)
    with pytest.raises(ValueError, match=f"expert={expert}"):
        experts.to_sequential(expert)
    with pytest.raises(ValueError, match=f"expert={expert}"):
        experts.from_sequential(expert, experts.to_sequential(0))


@pytest.mark.parametrize(
    "block",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)),
        nn.Sequential(
            *[nn.GroupNorm(1, 4) if i in (1, 5) else m for i, m in enumerate(ConvExperts(3, 4, 1).to_sequential(0))]
        ),
        ConvExperts(3, 5, 1).to_sequential(0),
        ConvExperts(3, 4, 1, hidden_channels=7).to_sequential(0),
        nn.Sequential(
            *[nn.Conv2d(3, 4, 3) if i == 0 else m for i, m in enumerate(ConvExperts(3, 4, 1).to_sequential(0))]
        ),
    ],
    ids=["too short", "other normalisation", "other width", "other hidden width", "bias"],
)
def test_a_block_that_does_not_fit_changes_nothing(block: nn.Sequential) -> None:
    experts = ConvExperts(3, 4, 2)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    with pytest.raises(ValueError, match="block does not fit expert 1"):
        experts.from_sequential(1, block)
    reference.assert_same(experts.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ConvExperts(**({"in_channels": 3, "out_channels": 4, "num_experts": 2} | options))


def test_statistics_of_a_network_in_bfloat16_are_of_full_precision() -> None:
    """16,384 ones and as many fives: in bfloat16 counting by 16 ends at 4,096. Mean 3, deviation 2."""
    norm = StackedBatchNorm(1, 1).bfloat16()
    x = torch.cat([torch.ones(1024, 1, 4, 4), 5 * torch.ones(1024, 1, 4, 4)]).bfloat16()
    out = norm(x, torch.zeros(2048, dtype=torch.int64), 4)
    assert out.dtype == torch.bfloat16
    assert out.unique().tolist() == [-1, 1]


# Layers against the modules

CHOICE = [0, 2, 0, 0, 2, 2, 0, 1]  # two images of 2 x 2 patches of 3 x 3
GRID = Grid(2, 2, 2)


def by_patch(maps: list[Tensor]) -> Tensor:
    """A map made of one map per expert: each patch from its own expert's."""
    extractor = PatchExtractor(3)
    patches = [extractor.split(m)[0] for m in maps]
    chosen = torch.stack([patches[e][i] for i, e in enumerate(CHOICE)])
    return extractor.merge(chosen, GRID, (maps[0].shape[2], maps[0].shape[3]))


@pytest.mark.parametrize("training", [True, False])
def test_zero_border_is_the_module_on_each_experts_patches(training: bool) -> None:
    layer, routing = routed_layer(CHOICE, GRID, border="zero")
    layer.train(training)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    patches, _ = layer.extractor.split(x)
    blocks = [layer.experts.to_sequential(e) for e in range(3)]
    expected = torch.zeros(8, 4, 3, 3, dtype=torch.float64)
    for e, block in enumerate(blocks):
        own = torch.tensor(CHOICE) == e
        expected[own] = block(patches[own])
    actual = layer.forward_given_routing(x, routing)
    torch.testing.assert_close(layer.extractor.split(actual)[0], expected, rtol=1e-10, atol=1e-10)
    for e, block in enumerate(blocks):
        ours = layer.experts.to_sequential(e).state_dict()
        reference.assert_same(
            {k: v for k, v in ours.items() if "running" in k},
            {k: v for k, v in block.state_dict().items() if "running" in k},
        )


@pytest.mark.parametrize("size", [(6, 6), (5, 4)])
def test_halo_is_the_first_module_on_the_map_and_the_second_on_the_patch(size: tuple[int, int]) -> None:
    layer, routing = routed_layer(CHOICE, GRID, border="halo")
    layer.eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    # Padded to whole patches and a ring around them, so that the first convolution has real neighbours everywhere.
    surrounded = F.pad(x, (1, 1 + 6 - size[1], 1, 1 + 6 - size[0]))
    blocks = [layer.experts.to_sequential(e) for e in range(3)]
    hidden = by_patch([block[:4](surrounded)[:, :, 1:-1, 1:-1] for block in blocks])
    hidden[:, :, size[0] :] = 0  # beyond the map
    hidden[:, :, :, size[1] :] = 0
    hidden_patches, _ = layer.extractor.split(hidden)
    out = torch.stack([blocks[e][4:](hidden_patches[i : i + 1])[0] for i, e in enumerate(CHOICE)])
    expected = layer.extractor.merge(out, GRID, size)
    actual = layer.forward_given_routing(x, routing)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)


@pytest.mark.parametrize("size", [(6, 6), (5, 4)])
def test_exchange_is_both_modules_on_the_map(size: tuple[int, int]) -> None:
    layer, routing = routed_layer(CHOICE, GRID, border="exchange")
    layer.eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    blocks = [layer.experts.to_sequential(e) for e in range(3)]
    hidden = by_patch([block[:4](x) for block in blocks])
    expected = by_patch([block[4:](hidden) for block in blocks])
    actual = layer.forward_given_routing(x, routing)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_dropout_lies_between_gelu_and_the_second_convolution(border: str) -> None:
    """One expert, one patch that covers the map, one channel: the block itself, at the same random numbers."""
    layer = PCELayer(1, 1, patch_size=6, num_experts=1, dropout=0.5, border=border, shortcut=False)
    layer = reference.randomise(layer.double())
    routing = route(torch.zeros(3, 1, dtype=torch.float64), Grid(3, 1, 1))
    x = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    block = layer.experts.to_sequential(0)
    torch.manual_seed(5)
    expected = block(x)
    torch.manual_seed(5)
    actual = layer.forward_given_routing(x, routing)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)
