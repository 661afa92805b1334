"""Spreads and intervals, worked out by hand; quantiles of Student's t from printed tables."""

from __future__ import annotations

import math

import pytest

from pcenet.comparison.curves import mean_curve
from pcenet.comparison.statistics import deviation, difference, half_width


def test_the_deviation_divides_by_one_less_than_the_values() -> None:
    # Squares of 1, 2, 3, 4 about 2.5: 2.25 + 0.25 + 0.25 + 2.25 = 5, over 3.
    assert deviation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3))
    assert deviation([1.0]) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], 4.3027 / math.sqrt(3)),  # deviation 1, t(0.975, 2) = 4.3027
        ([2.0, 4.0], 12.7062),  # deviation sqrt(2), over sqrt(2); t(0.975, 1) = 12.7062
        ([0.0, 0.0, 0.0, 0.0, 5.0], 2.7764),  # deviation sqrt(20 / 4), over sqrt(5); t(0.975, 4) = 2.7764
    ],
)
def test_the_interval_is_student_s(values: list[float], expected: float) -> None:
    assert half_width(values) == pytest.approx(expected, rel=1e-4)


def test_differences_are_paired_by_seed() -> None:
    found = difference({7: 11.0, 1: 22.0, 2: 33.0, 5: 99.0}, {2: 30.0, 7: 10.0, 1: 20.0, 4: -99.0})
    assert found is not None
    assert found.by_seed == {7: 1.0, 1: 2.0, 2: 3.0}
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 2.4842, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.4842, abs=1e-4)


def test_one_pair_has_a_difference_without_an_interval() -> None:
    found = difference({3: 0.5}, {3: 0.75, 4: 0.0})
    assert found is not None
    assert (found.mean, found.low, found.high) == (-0.25, None, None)


def test_without_a_pair_there_is_no_difference() -> None:
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_a_mean_curve_has_the_epochs_of_all_runs() -> None:
    def run(*scores: float | None) -> list[dict[str, float | None]]:
        return [{"epoch": float(n), "score": score} for n, score in enumerate(scores, start=1)]

    assert mean_curve([run(1.0, 3.0), run(3.0, 5.0, 9.0)], "score") == ([1, 2], [2.0, 4.0])
    epochs, (first, second) = mean_curve([run(1.0, None), run(3.0, 5.0)], "score")
    assert (epochs, first) == ([1, 2], 2.0)
    assert math.isnan(second)
