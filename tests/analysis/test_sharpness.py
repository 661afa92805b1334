"""Means over patches whose probabilities are known."""

from __future__ import annotations

import math

import pytest
import torch

from pcenet.analysis import SharpnessStatistics
from pcenet.nn import Grid, route


def test_means_by_hand_over_two_batches() -> None:
    statistics = SharpnessStatistics()
    statistics.update(route(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 1e-30]]).log(), Grid(1, 1, 2)))
    statistics.update(route(torch.full((1, 3), math.log(1 / 3)), Grid(1, 1, 1)))
    found = statistics.compute()
    assert found.gate == pytest.approx((0.7 + 0.5 + 1 / 3) / 3, abs=1e-6)
    assert found.margin == pytest.approx((0.5 + 0.0 + 0.0) / 3, abs=1e-6)
    first = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    assert found.entropy == pytest.approx((first + math.log(2) / math.log(3) + 1) / 3, abs=1e-6)


def test_a_saturated_router_is_sure() -> None:
    # 200 apart, the second probability is 0 in float32, and 0 ln 0 is 0.
    statistics = SharpnessStatistics()
    statistics.update(route(torch.tensor([[200.0, 0.0]]), Grid(1, 1, 1)))
    found = statistics.compute()
    assert (found.gate, found.margin, found.entropy) == (1, 1, 0)


def test_a_single_expert() -> None:
    statistics = SharpnessStatistics()
    statistics.update(route(torch.tensor([[0.3], [2.0]]), Grid(1, 1, 2)))
    found = statistics.compute()
    assert (found.gate, found.margin, found.entropy) == (1, 1, 0)


def test_nothing_seen() -> None:
    with pytest.raises(ValueError, match="no routing was recorded"):
        SharpnessStatistics().compute()
