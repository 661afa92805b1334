"""Router health is that of evaluation routing: what training evens out by construction cannot hide a dead expert."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pcenet.nn import PCELayer, RoutingStatistics, RoutingSummary, record_routing, routers_of
from pcenet.nn.patches import Grid
from pcenet.nn.routing import route
from pcenet.reporting.numbers import score_digits, score_text
from pcenet.reporting.tables import console, router_table, training_table
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.health import (
    bias_spreads,
    complaint,
    count_routings,
    health_of,
    logit_spread,
    recorded_health,
    training_of,
)
from pcenet.tasks.evaluation import evaluate
from pcenet.training import preparation
from pcenet.training.figures import EpochFigures, epoch_line
from pcenet.training.run import few_steps, train

Start = Callable[..., TrainConfig]

DEAD = RoutingSummary(load=(0.75, 0.0, 0.25, 0.0), entropy=0.4, max_min=math.inf, drop_rate=0.0, dead=(1, 3))
UNEVEN = RoutingSummary(load=(0.8, 0.2), entropy=0.72, max_min=4.0, drop_rate=0.0, dead=())
EVEN = RoutingSummary(load=(0.6, 0.4), entropy=0.97, max_min=1.5, drop_rate=0.0, dead=())


def cells(table: Any, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    console().print(table)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_dead_counts_and_a_list_of_experts_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    routers = {"a": health_of(DEAD), "b": health_of(EVEN)}
    assert (routers["a"]["dead"], routers["a"]["dead_experts"], routers["a"]["max_min"]) == (2, [1, 3], None)
    assert (routers["b"]["dead"], routers["b"]["dead_experts"], routers["b"]["max_min"]) == (0, [], 1.5)
    assert cells(router_table(routers), capsys) == [
        ["a", "75.0% 0.0% 25.0% 0.0%", "0.400", "n/a: dead experts", "0.00%", "2"],
        ["b", "60.0% 40.0%", "0.970", "1.50", "0.00%", "0"],
    ]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"b": EVEN}, None),
        ({}, None),
        ({"a": DEAD, "b": EVEN}, "2 of 6 experts get no patch at all (a: experts 1, 3)"),
        ({"b": UNEVEN}, "the busiest expert has more than 3 times the load of the idlest (b: 4.0)"),
        ({"a": DEAD, "b": UNEVEN}, "(a: experts 1, 3), and the busiest expert has more than 3 times"),
        ({"": DEAD}, "2 of 4 experts get no patch at all (the model: experts 1, 3)"),
    ],
)
def test_what_is_warned_of(layers: dict[str, RoutingSummary], words: str | None) -> None:
    found = complaint({name: health_of(summary) for name, summary in layers.items()})
    if words is None:
        assert found is None
    else:
        assert words in str(found)
        assert "\n" not in str(found)


def test_what_training_tells_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [0.0, -1.0, 4.0]])  # from 1 to 3, and from -1 to 4
    routing = route(logits, Grid(1, 1, 2))
    again = route(logits[:1], Grid(1, 1, 1))
    assert logit_spread([routing]).item() == 3.5
    assert logit_spread([routing, again]).item() == 2.75
    network = nn.Sequential(PCELayer(4, 4, patch_size=2, num_experts=3), PCELayer(4, 4, patch_size=2, balancing="none"))
    network[0].router.expert_bias.copy_(torch.tensor([0.5, -1.0, 0.25]))
    assert bias_spreads(network) == {"0": 1.5}
    row = {"epoch": 1.0, "train/loss": 2.0, "val_router/a/dead": 1.0}
    row |= {"train_router/a/drop_rate": 0.25, "train_router/a/bias_spread": 1.5, "train_router/b.c/drop_rate": 0.0}
    assert training_of(row) == {"a": {"drop_rate": 0.25, "bias_spread": 1.5}, "b.c": {"drop_rate": 0.0}}


def test_training_is_shown_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    table = training_table(
        {
            "a": {"drop_rate": 0.25, "bias_spread": 1.5, "logit_spread": 0.5},
            "b": {"drop_rate": 0.0, "logit_spread": 2.0},
        }
    )
    assert "in training" in str(table.title)
    assert cells(table, capsys) == [["a", "25.00%", "1.50", "0.50"], ["b", "0.00%", "none", "2.00"]]


def test_figures_of_older_runs_are_not_taken_for_health() -> None:
    before = {"router": {"a": {"load": [0.5, 0.5], "entropy": 1.0, "max_min": 1.0, "drop_rate": 0.1, "dead": []}}}
    assert recorded_health(before) == (None, {"a": {"drop_rate": 0.1}})
    assert recorded_health({"router": {}}) == ({}, {})
    now = {"val_router": {"a": health_of(DEAD)}, "train_router": {"a": {"drop_rate": 0.1}}}
    assert recorded_health(now) == (now["val_router"], now["train_router"])


def test_routings_are_counted_by_layer() -> None:
    network = nn.Sequential(PCELayer(4, 4, patch_size=2, num_experts=3)).eval()
    statistics: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
    for images in (2, 1):
        with torch.no_grad(), record_routing(network) as records:
            network(torch.randn(images, 4, 4, 6))
        count_routings(statistics, records)
    assert sum(statistics["0"].state_dict()["load"].tolist()) == 3 * 6  # type: ignore[union-attr]


def collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks whose routers prefer expert 0 by far, and whose bias at evaluation does not learn of it: batches of
    training are even, at evaluation all patches go to one expert."""
    build = preparation.build_model

    def one_sided(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        with torch.no_grad():
            for _, router in routers_of(model):
                router.logits.bias[0] += 1000
        return model

    monkeypatch.setattr(preparation, "build_model", one_sided)
    monkeypatch.setattr("pcenet.nn.routing.BIAS_MOMENTUM", 0.0)
    monkeypatch.setattr("pcenet.training.loop.update_expert_bias", lambda *_: None)


def test_a_layer_that_collapses_at_evaluation_shows_everywhere(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trained: list[list[float]] = []
    compute = EpochFigures.compute

    def keep(self: EpochFigures, model: torch.nn.Module) -> dict[str, float]:
        trained.extend(list(statistics.compute().load) for statistics in self.routing.values())
        return compute(self, model)

    monkeypatch.setattr(EpochFigures, "compute", keep)
    collapse(monkeypatch)
    with caplog.at_level(logging.WARNING, "pcenet"):
        folder = train(start(epochs=1))
    assert all(max(load) < 0.3 for load in trained), "training is even by construction"

    layers = ["stages.1.1.body", "stages.2.1.body"]
    metrics = json.loads(folder.metrics.read_text())
    for layer in layers:
        health = metrics["val_router"][layer]
        assert (health["load"], health["entropy"], health["max_min"]) == ([1.0, 0.0, 0.0, 0.0], 0.0, None)
        assert (health["dead"], health["dead_experts"]) == (3, [1, 2, 3])
        assert set(metrics["train_router"][layer]) == {"drop_rate", "bias_spread", "logit_spread"}
        assert metrics["train_router"][layer]["bias_spread"] == 0  # its running mean was held back
    with open(folder.logs / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    for layer in layers:
        assert [float(row[f"val_router/{layer}/load_{expert}"]) for expert in range(4)] == [1, 0, 0, 0]
        assert float(row[f"val_router/{layer}/dead"]) == 3
        assert math.isinf(float(row[f"val_router/{layer}/max_min"]))
    assert not [name for name in row if name.startswith("router/")]

    warning = "6 of 8 experts get no patch at all (stages.1.1.body: experts 1, 2, 3; stages.2.1.body: experts 1, 2, 3)"
    assert [warning in message for message in caplog.messages] == [True]
    shown = capsys.readouterr().out
    assert "6 dead experts on val" in shown
    assert shown.count("100.0% 0.0% 0.0% 0.0%") == 2
    assert f"next: pcenet explain {folder.path}" in shown

    caplog.clear()
    with caplog.at_level(logging.WARNING, "pcenet"):
        result = evaluate(EvalConfig(str(folder.path), device="cpu", precision="fp32", workers=0))
    assert result.router == metrics["val_router"]
    assert [warning in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("images", "text"),
    [(12, "58%"), (100, "58%"), (101, "58.3%"), (1000, "58.3%"), (1001, "58.33%"), (50_000, "58.33%")],
)
def test_no_digit_is_finer_than_an_image(images: int, text: str) -> None:
    assert score_text(7 / 12, images) == text
    # One image more or less can be seen, or there are 2 digits.
    assert 100 / images >= 10.0 ** -score_digits(images) or score_digits(images) == 2


def test_an_epoch_of_few_images_has_no_digits_that_they_do_not_support() -> None:
    row = {"epoch": 1.0, "train/lr": 0.003, "train/images_per_second": 9.0, "train/epoch_seconds": 9.0}
    row |= {f"train/{name}": 1.0 for name in ("loss", "task_loss", "balance_loss", "z_loss")}
    row |= {"train/top1": 0.7037, "val/top1": 7 / 12, "val_router/a/dead": 2.0, "val_router/b/dead": 1.0}
    line = epoch_line(row, 2, "top1", "top1", (81, 12))
    assert "  train 70%  val 58%  3 dead experts on val  " in line
    alive = row | {"val_router/a/dead": 0.0, "val_router/b/dead": 0.0}
    assert "  train 70.37%  val 58.33%  lr " in epoch_line(alive, 2, "top1", "top1", (5000, 5000))


@pytest.mark.parametrize(
    ("images", "steps", "options", "batch_size"),
    [
        (81, 1, {"batch_size": 128}, 16),  # 5 batches of 16
        (105, 1, {"batch_size": 128}, 16),
        (12, 2, {"batch_size": 8}, 2),
        (3, 1, {"batch_size": 3}, 1),
        (300, 2, {"batch_size": 128, "accumulate": 2}, 16),  # 300 / (5 * 2) = 30
        (81, 3, {"batch_size": 32}, None),
        (2, 2, {"batch_size": 1}, None),
        (81, 1, {"batch_size": 128, "overfit": 81}, None),
    ],
)
def test_few_steps_are_named_with_the_option(
    images: int, steps: int, options: dict[str, Any], batch_size: int | None
) -> None:
    config = TrainConfig(data="digits", **options)
    loader = range(steps * config.accumulate)
    run: Any = SimpleNamespace(
        config=config, sources={"train": range(images)}, loaders={"train": loader}, checkpoint=None
    )
    hint = few_steps(run)
    if batch_size is None:
        assert hint is None
    else:
        assert f"only {steps} step" in str(hint)
        assert f"--batch-size {batch_size} makes more" in str(hint)
        run.checkpoint = Path("checkpoint")
        assert few_steps(run) is None


def test_the_hint_comes_once_at_the_start(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    train(start(batch_size=16, epochs=2))
    lines = capsys.readouterr().out.splitlines()
    hints = [number for number, line in enumerate(lines) if "makes more" in line]
    epochs = [number for number, line in enumerate(lines) if line.startswith("epoch ")]
    assert len(hints) == 1
    assert hints[0] < epochs[0]
