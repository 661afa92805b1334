"""How much an expert tells of what lies in its patch: mutual information, from counts alone.

Counts are arrays ``[P, E, C]``: how many patches at position p went to expert e and were of class c. They add up over
batches, so nothing else of a data set is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Specialisation:
    """Normalised mutual information of expert and class, of expert and position, and of expert and class where the
    position is known. Each lies between 0 (independent) and 1 (each decides the other), and has beside it a control:
    the mean over tables of the same margins filled at random, which is what samples of this size give by chance alone.

    Attributes:
        patches: how many patches were counted.
        with_class, with_position, with_class_given_position: the measures.
        control_class, control_position, control_class_given_position: their controls.
    """

    patches: int
    with_class: float
    control_class: float
    with_position: float
    control_position: float
    with_class_given_position: float
    control_class_given_position: float


def specialisation(counts: Counts, shuffles: int = 20, seed: int = 0) -> Specialisation:
    """The measures of counts ``[P, E, C]``.

    Args:
        counts: patches by position, expert and class.
        shuffles: random tables per control.
        seed: of the random tables.

    Raises:
        ValueError: if counts are no such array, or empty.
    """
    if counts.ndim != 3 or counts.min(initial=0) < 0 or not counts.sum():
        raise ValueError(f"counts of shape {counts.shape} must be [P, E, C], none of them negative, with some patch")
    rng = np.random.default_rng(seed)

    def measured(table: Counts) -> tuple[float, float]:
        random = [conditional_information(shuffled(table, rng)) for _ in range(shuffles)]
        return conditional_information(table), float(np.mean(random))

    by_class, control_class = measured(counts.sum(axis=0, keepdims=True))
    by_position, control_position = measured(counts.sum(axis=2).T[None])
    given_position, control_given_position = measured(counts)
    return Specialisation(
        patches=int(counts.sum()),
        with_class=by_class,
        control_class=control_class,
        with_position=by_position,
        control_position=control_position,
        with_class_given_position=given_position,
        control_class_given_position=control_given_position,
    )


def conditional_information(counts: Counts) -> float:
    """Normalised mutual information of the last two axes given the first: ``2 I(E; C | P) / (H(E | P) + H(C | P))``.

    With a single position it is the usual measure with the arithmetic mean of the entropies below it. 0 where both
    entropies are 0: what is constant tells nothing.

    Args:
        counts: ``[P, E, C]``.
    """
    joint = counts / counts.sum()
    position = _plogp(joint.sum(axis=(1, 2)))
    expert = position - _plogp(joint.sum(axis=2))  # H(E | P) = H(E, P) - H(P)
    label = position - _plogp(joint.sum(axis=1))
    both = position - _plogp(joint)
    if expert + label <= 0:
        return 0.0
    # Rounding may leave a trace below 0 where the two are independent.
    return float(max(0.0, 2 * (expert + label - both) / (expert + label)))


def shuffled(counts: Counts, rng: np.random.Generator) -> Counts:
    """Counts of the same margins where expert and class are independent at each position: what permuting the classes
    of a position's patches among each other would give, drawn without the patches.

    Args:
        counts: ``[P, E, C]``.
        rng: where the numbers come from.
    """
    result = np.zeros_like(counts)
    for table, filled in zip(counts, result, strict=True):
        left = table.sum(axis=0)
        for expert, size in enumerate(table.sum(axis=1)):
            filled[expert] = rng.multivariate_hypergeometric(left, size)
            left = left - filled[expert]
    return result


def _plogp(p: npt.NDArray[np.float64]) -> float:
    """``sum p ln p``, with ``0 ln 0 = 0``."""
    positive = p[p > 0]
    return float((positive * np.log(positive)).sum())
