"""Router health, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pcenet.nn import Grid, Routing, RoutingStatistics, route


def routing_to(choice: list[int], num_experts: int, capacity_factor: float | None = None) -> Routing:
    logits = torch.nn.functional.one_hot(torch.tensor(choice), num_experts).float()
    return route(logits, Grid(len(choice), 1, 1), capacity_factor=capacity_factor)


def test_one_batch_by_hand() -> None:
    statistics = RoutingStatistics()
    # 8 choices: 4, 2, 2, 0. Capacity ceil(1 * 8 / 4) = 2, so 2 of the 4 are dropped.
    statistics.update(routing_to([0, 0, 0, 0, 1, 1, 2, 2], 4, capacity_factor=1.0))
    summary = statistics.compute()
    assert summary.load == (0.5, 0.25, 0.25, 0.0)
    # -(1/2 ln 1/2 + 2 * 1/4 ln 1/4) / ln 4 = (1/2 + 1) ln 2 / (2 ln 2) = 3/4.
    assert summary.entropy == pytest.approx(0.75, abs=1e-12)
    assert summary.max_min == math.inf
    assert summary.drop_rate == 0.25
    assert summary.dead == (3,)


def test_batches_add_up_by_their_size() -> None:
    statistics = RoutingStatistics()
    statistics.update(routing_to([0, 0, 0, 1], 2, capacity_factor=1.0))  # 2 of 3 kept
    statistics.update(routing_to([0, 1, 1, 1, 1, 1], 2, capacity_factor=1.0))  # 3 of 5 kept
    summary = statistics.compute()
    assert summary.load == (0.4, 0.6)
    assert summary.entropy == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / math.log(2), abs=1e-12)
    assert summary.max_min == pytest.approx(1.5, abs=1e-12)
    assert summary.drop_rate == pytest.approx(0.3, abs=1e-12)
    assert summary.dead == ()


def test_even_load_has_entropy_one() -> None:
    statistics = RoutingStatistics()
    statistics.update(routing_to([0, 1, 2], 3))
    summary = statistics.compute()
    assert summary.entropy == pytest.approx(1, abs=1e-12)
    assert (summary.max_min, summary.drop_rate, summary.dead) == (1.0, 0.0, ())


def test_collapsed_load_has_entropy_zero() -> None:
    statistics = RoutingStatistics()
    statistics.update(routing_to([1, 1, 1], 3))
    assert statistics.compute().entropy == 0
    assert statistics.compute().dead == (0, 2)


def test_one_expert_is_even() -> None:
    statistics = RoutingStatistics()
    statistics.update(routing_to([0, 0], 1))
    summary = statistics.compute()
    assert (summary.load, summary.entropy, summary.max_min, summary.dead) == ((1.0,), 1.0, 1.0, ())


def test_two_choices_count_twice() -> None:
    statistics = RoutingStatistics()
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    statistics.update(route(logits, Grid(2, 1, 1), top_k=2))
    assert statistics.compute().load == (0.5, 0.25, 0.25)


def test_reset_forgets_and_nothing_is_an_error() -> None:
    statistics = RoutingStatistics()
    with pytest.raises(ValueError, match="no routing"):
        statistics.compute()
    routing = routing_to([0, 1], 2)
    statistics.update(routing)
    statistics.reset()
    with pytest.raises(ValueError, match="no routing"):
        statistics.compute()
    statistics.update(routing_to([1, 1], 2))
    assert statistics.compute().load == (0.0, 1.0)
    assert routing.expert_counts.tolist() == [1, 1], "the routings themselves stay as they are"


def test_statistics_keep_no_graph() -> None:
    statistics = RoutingStatistics()
    logits = torch.randn(4, 2, requires_grad=True)
    statistics.update(route(logits, Grid(4, 1, 1)))
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in vars(statistics).values())
