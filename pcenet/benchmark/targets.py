"""What PCE may cost beside its dense twin, and how far a set of figures keeps to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

# No single case may be further beyond the limit than this.
SINGLE_CASE = 1.1


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: which `Record` s it is made of, by their ``line``.
        must: the limit of the geometric mean of their ratios.
        goal: what it should be.
    """

    name: str
    must: float
    goal: float


LINES = (
    Line("layer, forward, zero", 1.10, 1.00),
    Line("layer, forward, halo", 1.15, 1.00),
    Line("layer, forward, exchange", 1.30, 1.00),
    Line("layer, forward and backward, zero", 1.10, 1.00),
    Line("layer, forward and backward, halo", 1.20, 1.00),
    Line("layer, forward and backward, exchange", 1.35, 1.00),
    Line("patches of 2x2 and 1x1", 1.5, 1.1),
    Line("network, training step", 1.15, 1.00),
    Line("network, latency at batch 1", 1.30, 1.10),
    Line("from 4 to 64 experts", 1.15, 1.05),
    Line("network, peak memory of a training step", 1.30, 1.10),
    # The ratio is PCE's time by the rival's.
    Line("beside one-hot einsum dispatch", 1 / 2.5, 1 / 4),
)


def judge(records: Sequence[Record]) -> list[Record]:
    """Geometric mean and worst case of each line that has records, and whether its limit holds."""
    verdicts = []
    for line in LINES:
        ratios = [record["ratio"] for record in records if record["line"] == line.name]
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        verdicts.append(
            {
                "line": line.name,
                "cases": len(ratios),
                "mean": mean,
                "worst": max(ratios),
                "must": line.must,
                "goal": line.goal,
                "holds": mean <= line.must and max(ratios) <= SINGLE_CASE * line.must,
            }
        )
    return verdicts
