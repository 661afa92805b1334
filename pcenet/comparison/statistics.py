"""What several seeds say: means, spreads and paired differences. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 degrees of freedom); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A label against the baseline, over the seeds that both have.

    Attributes:
        by_seed: score less the baseline's, of each seed.
        mean: their mean.
        low, high: its 95 % confidence interval by Student's t over the differences; None for one seed.
    """

    by_seed: dict[int, float]
    mean: float
    low: float | None
    high: float | None


def difference(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Paired differences of two labels' scores by seed; None where they have no seed in common."""
    by_seed = {seed: score - baseline[seed] for seed, score in scores.items() if seed in baseline}
    if not by_seed:
        return None
    values = list(by_seed.values())
    mean = statistics.fmean(values)
    half = half_width(values)
    return Difference(by_seed, mean, *((None, None) if half is None else (mean - half, mean + half)))


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the confidence interval of a mean, ``t(n - 1) s / sqrt(n)``; None for fewer than two values."""
    spread = deviation(values)
    if spread is None:
        return None
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * spread / math.sqrt(len(values))
