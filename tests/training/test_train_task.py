from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import pcenet  # noqa: F401
from pcenet.nn.experts import StackedNorm
from pcenet.training.callbacks import average
from pcenet.training.task import learning_rate_factor, parameter_groups, step_seed


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.5),  # first of two steps of warm-up
        (1, 1.0),
        (2, 1.0),  # cos(0)
        (4, (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos(pi / 4)
        (6, 0.5),  # half way: cos(pi / 2)
        (10, 0.0),
        (99, 0.0),
    ],
)
def test_schedule(step: int, factor: float) -> None:
    assert learning_rate_factor(step, total_steps=10, warmup_steps=2) == pytest.approx(factor, abs=1e-12)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, total_steps=4, warmup_steps=0) == 1.0


def test_schedule_that_is_all_warmup_stays_defined() -> None:
    assert [learning_rate_factor(s, total_steps=2, warmup_steps=2) for s in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", ["pce_nano", "dense_nano"])
def test_norms_and_biases_do_not_decay_and_everything_else_does(name: str) -> None:
    model = timm.create_model(name)
    exempt = {
        id(parameter)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.BatchNorm2d | StackedNorm) or key == "bias"
    }
    assert exempt
    groups = parameter_groups(model, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert {id(p) in exempt for p in group["params"]} == {group["weight_decay"] == 0.0}


def test_average_by_hand() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    # n = 8: decay (1 + 8) / (10 + 8) = 1/2; n = 10**6: the decay itself.
    assert average(one, two, 8, decay=0.9).item() == 1.5
    assert average(one, two, 10**6, decay=0.75).item() == 1.25
    assert average(one, two, torch.tensor(0), decay=0.0).item() == 2.0
    assert average(torch.tensor(3), torch.tensor(7), 5, decay=0.9).item() == 7


def test_step_seeds_differ_between_steps_and_seeds_and_repeat() -> None:
    seeds = [step_seed(seed, step) for seed in range(3) for step in range(50)]
    assert len({seed % 2**32 for seed in seeds}) == 150  # torch's CPU generator uses 32 bits
    assert step_seed(1, 7) == seeds[57]
