"""What PCE may cost relative to its dense twin, and how far a set of figures keeps to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Record = dict[str, Any]

# No single case may be further beyond the limit than this.
SINGLE_CASE = 1.2


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: which `Record` s it is made of, by their ``line``.
        must: the limit of the geometric mean of their figures.
        goal: what it should be.
        figure: which figure of a record: the ratio of PCE's time or memory to the base's, or PCE's seconds.
    """

    name: str
    must: float
    goal: float
    figure: Literal["ratio", "s"] = "ratio"


def in_precision(name: str, precision: str) -> str:
    """The line of a name in a precision: there are lines of their own for bfloat16."""
    return f"{name}, bfloat16" if precision == "bf16" else name


BOTH_PRECISIONS = (
    Line("patches of 2x2 and 1x1, forward", 1.05, 0.95),
    Line("patches of 2x2 and 1x1, forward and backward", 1.15, 0.95),
    Line("network, training step", 1.10, 0.95),
    Line("network, batch 1", 1.20, 0.80),
    Line("network that segments, training step", 1.10, 0.95),
    Line("network that segments, batch 1", 1.20, 0.80),
    Line("network, both compiled, training step", 1.15, 1.00),
    Line("network, both compiled, batch 1", 1.30, 1.00),
    Line("from 4 to 64 experts", 1.35, 1.20),
    # The ratio is PCE's time to the rival's.
    Line("relative to one-hot einsum dispatch", 1 / 3, 1 / 4),
)
LINES = (
    Line("layer, forward, zero", 0.95, 0.85),
    Line("layer, forward, halo", 0.95, 0.85),
    Line("layer, forward, exchange", 1.00, 0.85),
    Line("layer, forward and backward, zero", 0.95, 0.80),
    Line("layer, forward and backward, halo", 1.00, 0.80),
    Line("layer, forward and backward, exchange", 1.05, 0.80),
    *BOTH_PRECISIONS,
    Line("time to compile pce_nano's training step", 40, 25, "s"),
    Line("network, peak memory of a training step", 1.10, 1.00),
    Line("layer, forward, bfloat16", 1.10, 1.00),
    Line("layer, forward and backward, bfloat16", 1.25, 1.00),
    *(replace(line, name=in_precision(line.name, "bf16")) for line in BOTH_PRECISIONS),
)


def judge(records: Sequence[Record]) -> list[Record]:
    """Geometric mean and worst case of each line that has records, and whether its limit holds."""
    verdicts = []
    for line in LINES:
        figures = [record[line.figure] for record in records if record["line"] == line.name]
        if not figures:
            continue
        mean = math.exp(sum(map(math.log, figures)) / len(figures))
        verdicts.append(
            {
                "line": line.name,
                "figure": line.figure,
                "cases": len(figures),
                "mean": mean,
                "worst": max(figures),
                "must": line.must,
                "goal": line.goal,
                "holds": mean <= line.must and max(figures) <= SINGLE_CASE * line.must,
            }
        )
    return verdicts


def in_digits(value: float, figure: str) -> str:
    """A figure as tables show it: two digits of a ratio, whole seconds."""
    return f"{value:.0f} s" if figure == "s" else f"{value:.2f}"
