"""Router health: what is counted, how files keep it, and what to warn of.

It is the health of evaluation routing, as the network will be used. In training a bias evens out the loads of each
batch: they are even by construction and say nothing. What training tells is how much was dropped, and how far the bias
has to push.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.nn import Routing, RoutingStatistics, RoutingSummary, routers_of

UNEVEN = 3.0  # a layer whose busiest expert has more than so many times the load of its idlest is not healthy

# The beginnings of the names of columns in metrics.csv, and of entries in metrics.json.
EVALUATED, TRAINED = "val_router", "train_router"

Health = dict[str, Any]


def count_routings(
    statistics: MutableMapping[str, RoutingStatistics], records: Mapping[str, Sequence[Routing]]
) -> None:
    """Add the Routings of each layer, as `pcenet.nn.record_routing` collects them, to its statistics."""
    for name, routings in records.items():
        for routing in routings:
            statistics[name].update(routing)


def health_of(summary: RoutingSummary) -> Health:
    """Router health of a layer as JSON can hold it.

    Returns:
        ``load``, ``entropy``, ``max_min`` (None where an expert got no patch), ``drop_rate``, ``dead`` (how many
        experts got no patch) and ``dead_experts`` (which).
    """
    return {
        "load": list(summary.load),
        "entropy": summary.entropy,
        "max_min": None if summary.dead else summary.max_min,
        "drop_rate": summary.drop_rate,
        "dead": len(summary.dead),
        "dead_experts": list(summary.dead),
    }


def columns_of(summary: RoutingSummary) -> dict[str, float]:
    """The same as numbers by name, as ``metrics.csv`` and loggers hold it."""
    values = {name: getattr(summary, name) for name in ("entropy", "max_min", "drop_rate")}
    loads = {f"load_{expert}": share for expert, share in enumerate(summary.load)}
    return values | {"dead": float(len(summary.dead))} | loads


@torch.no_grad()
def logit_spread(routings: Iterable[Routing]) -> Tensor:
    """A patch's largest less its smallest logit, the bias included: mean over patches and Routings."""
    return torch.stack(
        [(routing.logits.amax(dim=1) - routing.logits.amin(dim=1)).mean() for routing in routings]
    ).mean()


def bias_spreads(model: nn.Module) -> dict[str, float]:
    """By layer the largest less the smallest bias that evens out its loads, a running mean, in logits."""
    biases = {name: router.expert_bias for name, router in routers_of(model)}
    return {name: float(bias.max() - bias.min()) for name, bias in biases.items() if bias is not None}


def training_of(row: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By layer what the columns of an epoch tell of its routing in training."""
    found: dict[str, dict[str, float]] = {}
    for column, value in row.items():
        if match := re.fullmatch(rf"{TRAINED}/(.*)/(\w+)", column):
            found.setdefault(match[1], {})[match[2]] = value
    return found


def recorded_health(metrics: Mapping[str, Any]) -> tuple[dict[str, Health] | None, dict[str, Health]]:
    """By layer the health of a run's routers on ``val``, and what is known of them in training.

    Both are empty for dense networks. Versions that counted in training only left no health (None) but drop rates.

    Args:
        metrics: the content of ``metrics.json``.
    """
    if EVALUATED in metrics and TRAINED in metrics:
        return metrics[EVALUATED], metrics[TRAINED]
    before: Mapping[str, Any] = metrics.get("router") or {}
    return None if before else {}, {name: {"drop_rate": layer["drop_rate"]} for name, layer in before.items()}


def experts_in_words(experts: Sequence[int]) -> str:
    """Such as "experts 0, 3"."""
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"


def ratio_in_words(health: Health) -> str:
    """The largest load over the smallest, or why there is none."""
    return "n/a: dead experts" if health["max_min"] is None else f"{health['max_min']:.2f}"


def complaint(routers: Mapping[str, Health]) -> str | None:
    """What is wrong with the routers of a network at evaluation, in one line; None where nothing is.

    Args:
        routers: by layer its health.
    """
    experts = sum(len(health["load"]) for health in routers.values())
    dead = {name: health["dead_experts"] for name, health in routers.items() if health["dead"]}
    uneven = [(name, health["max_min"]) for name, health in routers.items() if (health["max_min"] or 0) > UNEVEN]
    parts = []
    if dead:
        cases = "; ".join(f"{name or 'the model'}: {experts_in_words(numbers)}" for name, numbers in dead.items())
        count = sum(map(len, dead.values()))
        parts.append(f"{count} of {experts} experts {'gets' if count == 1 else 'get'} no patch at all ({cases})")
    if uneven:
        cases = "; ".join(f"{name or 'the model'}: {ratio:.1f}" for name, ratio in uneven)
        parts.append(f"the busiest expert has more than {UNEVEN:g} times the load of the idlest ({cases})")
    if not parts:
        return None
    return f"routers at evaluation: {', and '.join(parts)}; longer training or a larger --balance may help"
