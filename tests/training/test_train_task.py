from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from trainers import classifying

import pcenet  # noqa: F401
from pcenet.nn import PCELayer, aux_loss, record_routing
from pcenet.runs.config import TrainConfig
from pcenet.training.averaging import average_of, update_average
from pcenet.training.loop import step_seed, training_mode
from pcenet.training.optimizer import parameter_groups
from pcenet.upcycling import upcycle


@pytest.mark.parametrize("name", ["pce_nano", "dense_nano"])
def test_norms_and_biases_do_not_decay_and_everything_else_does(name: str) -> None:
    model = timm.create_model(name)
    exempt = {
        id(parameter)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.BatchNorm2d) or key == "bias"
    }
    assert exempt
    groups = parameter_groups(model, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert {id(p) in exempt for p in group["params"]} == {group["weight_decay"] == 0.0}


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_differences_of_experts_decay_by_a_rate_of_their_own(weight_decay: float) -> None:
    model = timm.create_model("pce_nano")
    rates = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(model, weight_decay, 0.5)
        for parameter in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    differences = [p for name, p in model.named_parameters() if name.endswith("difference")]
    assert len(differences) == 4  # two convolutions in each of two layers
    assert all(rates.pop(id(parameter)) == 0.5 for parameter in differences)
    assert set(rates.values()) == {0.0, weight_decay}


def averaged(one: list[float], two: list[float], count: int | Tensor, decay: float) -> list[float]:
    values = [torch.tensor(value) for value in one]
    update_average(values, [torch.tensor(value) for value in two], count, decay)
    return [value.item() for value in values]


def test_average_by_hand() -> None:
    # n = 8: decay (1 + 8) / (10 + 8) = 1/2; n = 10**6: the decay itself.
    assert averaged([1.0, 0.0], [2.0, -4.0], 8, decay=0.9) == [1.5, -2.0]
    assert averaged([1.0, 0.0], [2.0, -4.0], 10**6, decay=0.75) == [1.25, -1.0]
    assert averaged([1.0], [2.0], torch.tensor(0), decay=0.0) == [2.0]
    assert averaged([3], [7], 5, decay=0.9) == [7]


def test_average_reads_the_count_once_and_only_for_numbers_that_are_averaged() -> None:
    class Count(int):
        readings = 0

        def __int__(self) -> int:
            Count.readings += 1
            return 8

    averaged([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], Count(8), decay=0.9)
    averaged([1, 2], [3, 4], Count(8), decay=0.9)
    assert Count.readings == 1


def test_every_parameter_and_buffer_is_averaged_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    average = average_of(model, 0.25)
    assert not average.module.training
    expected = {}
    for n in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(7, 3))
        average.update_parameters(model)
        # The first update takes everything over; then n updates lie behind: (1 + 1) / (10 + 1) = 0.18, then 0.25.
        weight = {0: 1.0, 1: 1 - 2 / 11}.get(n, 0.75)
        for name, value in model.state_dict().items():
            blend = n > 0 and value.is_floating_point()
            expected[name] = torch.lerp(expected[name], value, weight) if blend else value.clone()
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["1.num_batches_tracked"] == 4


class OneLayer(nn.Module):
    """Two classes; the router gives every patch the logits (level, level)."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.layer = PCELayer(3, 2, patch_size=4, num_experts=2)
        nn.init.zeros_(self.layer.router.logits.weight)
        nn.init.constant_(self.layer.router.logits.bias, level)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3))


@pytest.mark.parametrize(
    ("level", "z", "auxiliary"),
    [
        # Balance: probabilities 1/2, all patches with one expert: 2 * (1/2 * 1 + 1/2 * 0) = 1. z: (ln 2)^2.
        (0.0, 2.0, 0.5 * 1 + 2 * math.log(2) ** 2),
        # z: (1e20)^2 is infinite in float32, and must not count at weight 0.
        (1e20, 0.0, 0.5 * 1),
    ],
)
def test_loss_is_the_tasks_plus_the_weighted_auxiliary_ones(level: float, z: float, auxiliary: float) -> None:
    config = TrainConfig(balance=0.5, z=z, label_smoothing=0.0)
    trainer = classifying(OneLayer(level), config)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    loss, seen = trainer.batch_loss((images, labels), 0)
    assert seen.values["balance_loss"].item() == 1
    assert loss.item() == pytest.approx(seen.values["task_loss"].item() + auxiliary, rel=1e-6)


def test_step_seeds_differ_between_steps_and_seeds_and_repeat() -> None:
    seeds = [step_seed(seed, step) for seed in range(3) for step in range(50)]
    assert len({seed % 2**32 for seed in seeds}) == 150  # torch's CPU generator uses 32 bits
    assert step_seed(1, 7) == seeds[57]


@pytest.mark.parametrize("freeze", ["pretrained", "dense", None])
def test_what_is_frozen_stays_what_it_was(freeze: str | None) -> None:
    """Weights, and the statistics of batch normalisations, which training mode would move."""
    resnet = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(8, 8, 12, 12), stem_width=8, num_classes=3)
    model = upcycle(resnet, layers=1.0, num_experts=2, patch_size=2, example=torch.randn(1, 3, 32, 32), freeze=freeze)
    trainer = classifying(model, TrainConfig())
    model.eval()
    training_mode(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with record_routing(model) as records:
        loss = trainer.objective.loss(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])) + aux_loss(records)
    loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    may_move = {"pretrained": ("router", "difference"), "dense": ("router", "kernels"), None: ("",)}[freeze]
    assert moved
    assert all(any(part in name for part in may_move) for name in moved)
    assert any("expert_bias" in name for name in moved)
    assert any("running_mean" in name for name in moved) == (freeze is None)
