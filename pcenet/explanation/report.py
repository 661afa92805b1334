"""All figures of a report as plain values, as ``explain.json`` holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pcenet
from pcenet.analysis import specialisation
from pcenet.analysis.effects import Effect, Intervention, Tally, effect, score
from pcenet.analysis.specialisation import Counts
from pcenet.choices import TaskName
from pcenet.explanation.study import LayerStudy, Study
from pcenet.runs.health import health_of

SCORES: dict[TaskName, str] = {"classify": "top-1", "segment": "mIoU"}

Report = dict[str, Any]


def layer_report(
    name: str, layer: LayerStudy, classes: Sequence[str], file_name: Callable[[int], str], seed: int
) -> Report:
    """What was counted of one layer.

    Args:
        name: of the layer.
        layer: the counts.
        classes: class names, by class number.
        file_name: what to call an image, by its number.
        seed: of the shuffled controls.
    """
    first = layer.first
    counted = bool(layer.by_class.by_grid) and any(counts.sum() for counts in layer.by_class.by_grid.values())
    by_class: Counts | None = layer.by_class.compute() if counted else None
    grid, by_place = max(layer.by_place.by_grid.items(), key=lambda item: item[1].sum())
    return {
        "name": name,
        "title": name.removesuffix(".body") or "the layer",
        "experts": layer.num_experts,
        "top_k": first.routing.top_k,
        "patch_side": first.patch_size,
        "map_size": list(first.map_size),
        "grid": list(grid),
        "grids": len(layer.by_place.by_grid),
        "health": health_of(layer.health.compute()),
        "sharpness": asdict(layer.sharpness.compute()),
        "agreement": {view: asdict(statistics.compute()) for view, statistics in layer.agreement.items()},
        "specialisation": None if by_class is None else asdict(specialisation(by_class, seed=seed)),
        # Patches of each class, expert by expert.
        "by_class": {} if by_class is None else dict(zip(classes, by_class.sum(axis=0).T.tolist(), strict=True)),
        # Patches at each place of the most frequent grid, row by row, expert by expert.
        "by_place": by_place[:, :, 0].T.tolist(),
        "gallery": [
            [
                {"image": file_name(each.image), "gate": each.gate, "row": each.row, "column": each.column}
                for each in layer.gallery.of(expert)
            ]
            for expert in range(layer.num_experts)
        ],
    }


def score_report(task: TaskName, tally: Tally, classes: Sequence[str]) -> Report:
    """The score of a network, and that of each class (None where a class has none)."""
    hits, out_of = tally.hits.sum(0), tally.out_of.sum(0)
    return {
        "name": SCORES[task],
        "value": float(score(task, hits, out_of)),
        "by_class": {
            name: float(hit / total) if total else None for name, hit, total in zip(classes, hits, out_of, strict=True)
        },
    }


def effect_report(intervention: Intervention, effect: Effect, classes: Sequence[str]) -> Report:
    """What an intervention did."""
    return {
        "name": intervention.name,
        "layer": intervention.layer,
        "expert": intervention.expert,
        "score": effect.score,
        "difference": effect.difference,
        "low": effect.low,
        "high": effect.high,
        "by_class": {
            name: None if math.isnan(value) else value
            for name, value in zip(classes, effect.by_class.tolist(), strict=True)
        },
    }


def intervention_report(
    task: TaskName,
    base: Tally,
    changed: Sequence[tuple[Intervention, Tally]],
    *,
    classes: Sequence[str],
    layers: Sequence[str],
    seed: int,
) -> Report:
    """What the interventions did: those of all layers first, then layer by layer.

    Args:
        task: of the network.
        base: counts of the untouched network.
        changed: each intervention with its counts of the same images.
        classes: class names, by class number.
        layers: names of the layers in the order in which they run.
        seed: of the intervals.
    """
    order = {name: number for number, name in enumerate(layers)}
    rows = sorted(changed, key=lambda pair: -1 if pair[0].layer is None else order[pair[0].layer])
    return {
        "images": len(base.hits),
        "score": float(score(task, base.hits.sum(0), base.out_of.sum(0))),
        "rows": [effect_report(each, effect(task, base, counts, seed=seed), classes) for each, counts in rows],
    }


def twin_report(task: TaskName, name: str, twin: Tally, network: Tally, cost: Mapping[str, Any], seed: int) -> Report:
    """The twin's score on the same images, and by how much the network is ahead of it, with an interval."""
    ahead = effect(task, twin, network, seed=seed)
    return {
        "run": name,
        "value": float(score(task, twin.hits.sum(0), twin.out_of.sum(0))),
        "ahead": ahead.difference,
        "low": ahead.low,
        "high": ahead.high,
        "cost": dict(cost),
    }


def whole_report(
    about: Mapping[str, Any],
    found: Study,
    *,
    task: TaskName,
    classes: Sequence[str],
    file_name: Callable[[int], str],
    seed: int,
) -> Report:
    """All that one pass over the data gives, behind what is known of the run.

    Args:
        about: the entries that come first.
        found: what was counted.
        task: of the network.
        classes: class names, by class number.
        file_name: what to call an image of the data, by its number.
        seed: of the shuffled controls.
    """
    layers = [layer_report(name, layer, classes, file_name, seed) for name, layer in found.layers.items()]
    return {
        "pcenet": pcenet.__version__,
        **about,
        "task": task,
        "images": found.images,
        "classes": list(classes),
        "score": score_report(task, found.tally, classes),
        "layers": layers,
    }
