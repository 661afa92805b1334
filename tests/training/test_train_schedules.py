"""Schedules by hand, and what they do to the routers of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pcenet.nn import PCELayer, Router, routers_of
from pcenet.runs.config import TrainConfig
from pcenet.training.loop import Trainer
from pcenet.training.run import train
from pcenet.training.schedules import Schedules, learning_rate_factor, linear, set_routers

Start = Callable[..., TrainConfig]


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
def test_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, total_steps=10, warmup_steps=2) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (2, 1.0), (6, 0.5**0.9), (10, 0.0), (99, 0.0)])
def test_poly(step: int, factor: float) -> None:
    assert learning_rate_factor(step, total_steps=10, warmup_steps=2, schedule="poly") == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (6, 1.0), (10, 1.0)])
def test_constant(step: int, factor: float) -> None:
    assert learning_rate_factor(step, total_steps=10, warmup_steps=2, schedule="constant") == factor


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_without_warmup_it_starts_at_the_peak(schedule: Any) -> None:
    assert learning_rate_factor(0, total_steps=4, warmup_steps=0, schedule=schedule) == 1.0


def test_a_schedule_that_is_all_warmup_stays_defined() -> None:
    assert [learning_rate_factor(s, total_steps=2, warmup_steps=2) for s in range(3)] == [0.5, 1.0, 1.0]


def test_a_line_has_two_ends() -> None:
    assert [linear(step, start=3.0, end=1.0, steps=4) for step in (0, 1, 2, 4, 5)] == [3.0, 2.5, 2.0, 1.0, 1.0]
    assert linear(0, start=3.0, end=1.0, steps=0) == 1.0


def test_schedules_of_a_run_by_hand() -> None:
    config = TrainConfig(
        epochs=4,
        temperature=5.0,
        temperature_epochs=2.0,
        balance_start=0.11,
        balance_epochs=1.0,
        router_noise=0.8,
    )
    schedules = Schedules(config, steps_per_epoch=10)
    assert [schedules.temperature(step) for step in (0, 5, 10, 20, 30)] == [5.0, 4.0, 3.0, 1.0, 1.0]
    assert [schedules.balance(step) for step in (0, 5, 10, 39)] == pytest.approx([0.11, 0.06, 0.01, 0.01])
    assert [schedules.router_noise(step) for step in (0, 5, 20, 39)] == pytest.approx([0.8, 0.6, 0.0, 0.0])  # half
    assert set(schedules.of_the_routers) == {"temperature", "balance_weight", "router_noise"}


def test_by_default_nothing_changes_but_the_learning_rate() -> None:
    schedules = Schedules(TrainConfig(), steps_per_epoch=10)
    assert schedules.of_the_routers == {}
    for step in (0, 70, 149):
        values = (schedules.temperature(step), schedules.balance(step), schedules.router_noise(step))
        assert values == (1.0, 0.01, 0.0)


def test_noise_has_the_deviation_asked_for_and_is_of_the_default_generator() -> None:
    layer = PCELayer(3, 3, patch_size=1, num_experts=4)
    network = nn.Sequential(layer)
    x = torch.randn(4, 3, 32, 32)
    plain = layer.router(x).logits
    set_routers(network, temperature=2.0, noise=0.5)
    noisy = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noisy.append(layer.router(x).logits - plain)
    assert layer.router.temperature == 2
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    # 16,384 draws: the deviation is within 4 of its own deviations, 0.5 / sqrt(2 * 16384) each.
    assert noisy[0].std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * 16384))
    set_routers(network)
    assert torch.equal(layer.router(x).logits, plain)
    assert layer.router.temperature == 1


def test_routers_of_a_run_follow_the_schedules(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, float, float]] = []
    forward = Router.forward

    def watch(self: Router, x: torch.Tensor) -> Any:
        noise = self.perturb.keywords["deviation"] if self.perturb else 0.0
        seen.append((self.training, self.temperature, noise))
        return forward(self, x)

    monkeypatch.setattr(Router, "forward", watch)
    # Two epochs of three steps, both schedules over four steps: 3, 2.5, 2, 1.5, 1, 1 and 0.4, 0.3, 0.2, 0.1, 0, 0.
    folder = train(start(temperature=3.0, temperature_epochs=4 / 3, router_noise=0.4, router_noise_epochs=4 / 3))
    layers = 2
    training = [entry[1:] for entry in seen if entry[0]][::layers]
    assert [temperature for temperature, _ in training] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    assert [noise for _, noise in training] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert {entry[1:] for entry in seen if not entry[0]} == {(1.0, 0.0)}
    with open(folder.logs / "metrics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [float(row["train/temperature"]) for row in logged] == [2.0, 1.0]  # of each epoch's last step
    assert [float(row["train/router_noise"]) for row in logged] == pytest.approx([0.2, 0.0])


def test_balance_weight_enters_the_loss(start: Start) -> None:
    constant = train(start("constant", epochs=1, balance=0.5, z=0.0))
    rising = train(start("rising", epochs=1, balance=0.5, balance_start=0.2, balance_epochs=1.0, z=0.0))
    rows = []
    for run in (constant, rising):
        with open(run.logs / "metrics.csv", newline="") as file:
            rows.append({name: float(value) for name, value in next(csv.DictReader(file)).items()})
    assert "train/balance_weight" not in rows[0]
    # 0.2, 0.3, 0.4 in three steps of equal batches: logged is the last one; the balance loss itself stays near 2.
    assert rows[1]["train/balance_weight"] == pytest.approx(0.4)
    added = [row["train/loss"] - row["train/task_loss"] for row in rows]
    assert added[0] == pytest.approx(0.5 * rows[0]["train/balance_loss"], rel=1e-5)
    assert added[1] == pytest.approx(0.3 * rows[1]["train/balance_loss"], rel=0.02)


def test_a_trained_network_has_routers_at_rest(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: trainers.append(self) or fit(self))
    train(start(epochs=1, temperature=4.0, temperature_epochs=9.0, router_noise=0.3, router_noise_epochs=9.0))
    routers = [router for _, router in routers_of(trainers[0].model)]
    assert {(router.temperature, router.perturb) for router in routers} == {(1.0, None)}
