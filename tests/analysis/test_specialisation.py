"""Mutual information on tables small enough for pencil and paper, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from pcenet.analysis import specialisation
from pcenet.analysis.specialisation import conditional_information, shuffled


def test_a_table_by_hand() -> None:
    # p = [[1/2, 0], [1/4, 1/4]]: H(E) = ln 2, H(C) = -(3/4 ln 3/4 + 1/4 ln 1/4) = 2 ln 2 - 3/4 ln 3,
    # H(E, C) = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2, so I = 3/2 ln 2 - 3/4 ln 3.
    counts = np.array([[[4, 0], [2, 2]]])
    information = 1.5 * math.log(2) - 0.75 * math.log(3)
    mean_entropy = (math.log(2) + 2 * math.log(2) - 0.75 * math.log(3)) / 2
    assert conditional_information(counts) == pytest.approx(information / mean_entropy, abs=1e-12)


def test_position_that_explains_everything_leaves_nothing() -> None:
    # At each position expert and class are constant; over all positions each decides the other.
    counts = np.array([[[5, 0], [0, 0]], [[0, 0], [0, 5]]])
    result = specialisation(counts)
    assert result.patches == 10
    assert result.with_class == pytest.approx(1, abs=1e-12)
    assert result.with_position == pytest.approx(1, abs=1e-12)
    assert result.with_class_given_position == 0
    assert result.control_class_given_position == 0


def test_class_that_decides_at_each_position_in_another_way() -> None:
    # Expert = class at position 0, the other one at position 1: nothing to see without the position.
    counts = np.array([[[3, 0], [0, 3]], [[0, 3], [3, 0]]])
    result = specialisation(counts)
    assert result.with_class == pytest.approx(0, abs=1e-12)
    assert result.with_class_given_position == pytest.approx(1, abs=1e-12)
    assert result.with_position == pytest.approx(0, abs=1e-12)


def test_without_position_as_scikit_learn_has_it() -> None:
    rng = np.random.default_rng(0)
    expert, label = rng.integers(0, 4, 500), rng.integers(0, 7, 500)
    label = np.where(rng.random(500) < 0.4, expert, label)
    counts = np.zeros((1, 4, 7), np.int64)
    np.add.at(counts, (0, expert, label), 1)
    assert conditional_information(counts) == pytest.approx(normalized_mutual_info_score(label, expert), abs=1e-12)


def test_given_position_is_the_mean_over_positions_of_information_by_that_of_entropies() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, (3, 4, 5))

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    information = entropies = 0.0
    for table in counts:
        share, p = table.sum() / counts.sum(), table / table.sum()
        expert, label = entropy(p.sum(1)), entropy(p.sum(0))
        information += share * (expert + label - entropy(p))
        entropies += share * (expert + label) / 2
    assert conditional_information(counts) == pytest.approx(information / entropies, abs=1e-12)


def test_shuffling_keeps_the_margins_of_each_position_and_nothing_else() -> None:
    counts = np.array([[[40, 0], [0, 40]], [[7, 0], [0, 1]]])
    rng = np.random.default_rng(0)
    cells = []
    for _ in range(400):
        table = shuffled(counts, rng)
        np.testing.assert_array_equal(table.sum(1), counts.sum(1))
        np.testing.assert_array_equal(table.sum(2), counts.sum(2))
        cells.append(table[0, 0, 0])
    # Hypergeometric: 40 of 80, 40 of them of class 0: mean 20, variance 40 * 1/2 * 1/2 * 40/79 = 5.063. The mean of 400
    # has a standard deviation of 0.1125; five of them either side.
    assert abs(np.mean(cells) - 20) < 5 * 0.1125


def test_the_control_shows_the_bias_of_few_samples() -> None:
    # Independent by construction, 8 patches per position: the measure is well above 0, and so is its control.
    rng = np.random.default_rng(2)
    counts = np.zeros((200, 4, 4), np.int64)
    np.add.at(counts, (np.repeat(np.arange(200), 8), rng.integers(0, 4, 1600), rng.integers(0, 4, 1600)), 1)
    result = specialisation(counts)
    assert result.with_class_given_position > 0.3
    assert result.with_class_given_position == pytest.approx(result.control_class_given_position, abs=0.03)


@pytest.mark.parametrize("counts", [np.zeros((1, 2, 2), np.int64), np.ones((2, 2), np.int64), -np.ones((1, 1, 1), int)])
def test_no_counts(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"counts of shape .* must be \[P, E, C\]"):
        specialisation(counts)
