"""Costs by hand, and against torch's own counter of floating-point operations."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pcenet
from pcenet.models import list_models, twin_of
from pcenet.nn import PCELayer


def test_one_layer_by_hand():
    layer = PCELayer(6, 10, patch_size=4, num_experts=3, hidden_channels=8, num_bands=2, router_hidden=5)
    cost = pcenet.complexity(layer, (6, 8, 12))
    # 2 x 3 patches of 16 cells: 9 * (6 * 8 + 8 * 10) per cell.
    experts = 96 * 9 * (6 * 8 + 8 * 10)
    # Content 6 -> 5 on 96 pixels; position: 8 rows and 12 columns with 2 kinds * 2 bands * 2 functions each -> 5; then
    # 5 -> 3 on 6 patches.
    router = 96 * 6 * 5 + (8 + 12) * 8 * 5 + 6 * 5 * 3
    shortcut = 96 * 6 * 10
    assert cost.routed_multiply_adds == experts
    assert cost.router_multiply_adds == router
    assert cost.multiply_adds == experts + router + shortcut
    assert cost.router_share == router / (experts + router + shortcut)
    assert cost.routed_share == experts / (experts + router + shortcut)
    # One expert: two kernels, and two normalisations of weight and bias.
    expert_parameters = 9 * (6 * 8 + 8 * 10) + 2 * 8 + 2 * 10
    router_parameters = (6 + 16) * 5 + 5 + 5 * 3 + 3
    shared = 9 * (6 * 8 + 8 * 10)
    assert cost.parameters == shared + 3 * expert_parameters + router_parameters + 6 * 10
    assert cost.active_parameters == expert_parameters + router_parameters + 6 * 10


def test_flat_input_top_2_and_padding_by_hand():
    layer = PCELayer(
        3, 3, patch_size=4, num_experts=4, num_bands=1, router_hidden=2, gate_input="flat", top_k=2, shortcut=False
    )
    cost = pcenet.complexity(layer, (3, 5, 4))
    # 5 x 4 is padded to 8 x 4: 2 patches of 16 cells, each through 2 experts.
    assert cost.routed_multiply_adds == 2 * 2 * 16 * 9 * (3 * 3 + 3 * 3)
    assert cost.router_multiply_adds == 2 * 16 * (3 + 8) * 2 + 2 * 2 * 4
    expert_parameters = 2 * 81 + 4 * 3
    shared = 2 * 81
    assert cost.parameters - cost.active_parameters == shared + 2 * expert_parameters


@pytest.mark.parametrize("name", ["dense_nano", "dense_tiny", "pce_nano", "pce_nano_spec", "pce_tiny"])
def test_agrees_with_torch(name):
    """Experts may compute padding as well, much of it where patches are few; that is no active work."""
    model = timm.create_model(name).eval()
    input_size = model.pretrained_cfg["input_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *input_size))
    cost = pcenet.complexity(model, input_size)
    assert 2 * cost.multiply_adds <= counter.get_total_flops() <= 2 * (cost.multiply_adds + cost.routed_multiply_adds)


def test_torch_counts_right_the_first_time():
    """Its counter knows the operators that there are when it is made, before a layer has run."""
    code = """
import torch, pcenet
from torch.utils.flop_counter import FlopCounterMode
model = pcenet.create_network("pce_nano", num_classes=10).eval()
counts = []
for _ in range(2):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    counts.append(counter.get_total_flops())
assert counts[0] == counts[1] >= 2 * 34e6, counts
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_borders_cost_the_same(border):
    model = timm.create_model("pce_nano", border=border)
    assert pcenet.complexity(model, (3, 32, 32)) == pcenet.complexity(timm.create_model("pce_nano"), (3, 32, 32))


def test_other_modules():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False),
        nn.Conv2d(5, 10, 3, padding=1, groups=5, bias=False),
        nn.Flatten(),
        nn.Linear(10 * 8 * 8, 7),
    )
    assert pcenet.complexity(model, (3, 4, 4)).multiply_adds == 16 * 3 * 5 * 4 + 64 * 10 * 9 + 640 * 7


def test_a_model_without_parameters_costs_nothing():
    cost = pcenet.complexity(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), (3, 4, 4))
    assert (cost.parameters, cost.multiply_adds, cost.router_share, cost.routed_share) == (0, 0, 0, 0)


def test_the_model_is_left_as_it_was():
    model = timm.create_model("pce_nano").train()
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pcenet.complexity(model, (3, 32, 32))
    assert [model.training, model.stem.training, model.head.training] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name in list_models("classify") if twin_of(name)])
def test_twins_cost_the_same(name):
    model, twin = timm.create_model(name), timm.create_model(twin_of(name))
    cost = pcenet.complexity(model, model.pretrained_cfg["input_size"])
    twin_cost = pcenet.complexity(twin, model.pretrained_cfg["input_size"])
    assert cost.multiply_adds - cost.router_multiply_adds == pytest.approx(twin_cost.multiply_adds, rel=0.01)
    assert cost.router_share < 0.06
    assert twin_cost.router_multiply_adds == twin_cost.routed_multiply_adds == 0
    size = name.removesuffix("_spec").removeprefix("pce_")
    expected = {"nano": 35e6, "tiny": 0.6e9, "small": 2e9, "nano_s2": 0.57e9, "tiny_s2": 2.9e9}
    assert cost.multiply_adds == pytest.approx(expected[size], rel=0.05)
