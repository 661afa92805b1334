"""What a comparison found, as plain values, and the files that say so."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from filelock import FileLock

from pcenet.comparison.config import OF_A_RUN, CompareConfig, PlannedRun
from pcenet.comparison.curves import curves
from pcenet.comparison.results import Result, read_results
from pcenet.comparison.statistics import CONFIDENCE, deviation, difference
from pcenet.comparison.tables import markdown
from pcenet.reporting.plots import drawing, png_of
from pcenet.runs.health import EVALUATED, TRAINED, recorded_health
from pcenet.tasks import get_task
from pcenet.writing import write_bytes, write_json, write_text

log = logging.getLogger(__name__)

Report = dict[str, Any]


def write_report(config: CompareConfig, baseline: str | None) -> Report:
    """Write ``comparison.json``, ``comparison.md`` and ``curves.png`` of the runs that are finished.

    Only one process at a time does this, and reads the results again, so that the last one writes them all.

    Args:
        config: the options.
        baseline: the label that the others are compared with, if any.

    Returns:
        The content of ``comparison.json``. Where no run is finished nothing is written.
    """
    folder = config.folder
    report = make_report(config, baseline)
    if not report["runs"]:
        return report
    with FileLock(folder / ".lock"):
        report = make_report(config, baseline)
        write_json(folder / "comparison.json", report)
        write_text(folder / "comparison.md", markdown(report))
        with drawing(folder / "curves.png"):
            write_bytes(folder / "curves.png", png_of(curves(report)))
    return report


def make_report(config: CompareConfig, baseline: str | None) -> Report:
    """The content of ``comparison.json``, from the results that lie in the comparison's folder.

    Raises:
        ValueError: if a file of a result is damaged.
    """
    found = read_results(config.folder)
    done = [(run, found[run.name]) for run in config.runs if run.name in found]
    objective = get_task(config.recipe.task).objective
    scores = {label: {run.seed: result.score for run, result in done if run.label == label} for label in config.labels}
    return {
        "task": config.recipe.task,
        "score": objective.score,
        "train_score": objective.train_score,
        "models": list(config.labels),
        "seeds": list(config.seed_list),
        "baseline": baseline,
        "confidence": CONFIDENCE,
        "recipe": {name: value for name, value in asdict(config.recipe).items() if name not in OF_A_RUN},
        "variants": {label: config.variants[label] or {} for label in config.labels if label in config.variants},
        "planned": len(config.runs),
        "environments": environments(done),
        "summary": [summary(label, scores, baseline, done) for label in config.labels if scores[label]],
        "runs": [run_figures(run, result) for run, result in done],
    }


def environments(done: Sequence[tuple[PlannedRun, Result]]) -> list[dict[str, Any]]:
    """Versions and hardware, each with the names of the runs that were made there."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for run, result in done:
        names = next((names for environment, names in groups if environment == result.environment), None)
        if names is None:
            groups.append((result.environment, [run.name]))
        else:
            names.append(run.name)
    return [environment | {"runs": names} for environment, names in groups]


def run_figures(run: PlannedRun, result: Result) -> dict[str, Any]:
    """What is kept of one run."""
    kept = ("epochs", "stopped", "best", "val", "epoch_seconds", "images_per_second", "complexity")
    evaluated, trained = recorded_health(result.metrics)
    return {
        "label": run.label,
        "seed": run.seed,
        "name": run.name,
        "model": result.config.model,
        "score": result.score,
        **{name: result.metrics.get(name) for name in kept},
        EVALUATED: evaluated,
        TRAINED: trained,
        "curve": result.curve(),
    }


def summary(
    label: str,
    scores: Mapping[str, Mapping[int, float]],
    baseline: str | None,
    done: Sequence[tuple[PlannedRun, Result]],
) -> dict[str, Any]:
    """What the runs of a label say together: the spread of their scores, and the difference to the baseline's."""
    values = list(scores[label].values())
    metrics = [result.metrics for run, result in done if run.label == label]
    against = None if baseline in (None, label) else difference(scores[label], scores[str(baseline)])
    return {
        "label": label,
        "seeds": list(scores[label]),
        "mean": statistics.fmean(values),
        "deviation": deviation(values),
        "difference": None if against is None else asdict(against),
        "epoch_seconds": statistics.fmean(figures["epoch_seconds"] for figures in metrics),
        "complexity": metrics[0]["complexity"],
        "routers": router_extremes(metrics),
    }


def router_extremes(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The least healthy figures of all layers and runs: ``val``, of evaluation routing on that split, and ``train``,
    the drop rate of the last epoch; None without PCE layers.

    ``val`` is None where a run is of a version that did not measure it. Its ``max_min`` is None where an expert got no
    patch; ``dead`` is the largest number of such experts in a layer.

    Args:
        runs: the content of each run's ``metrics.json``.
    """
    found = [recorded_health(metrics) for metrics in runs]
    trained = [layer for _, training in found for layer in training.values()]
    if not trained:
        return None
    evaluated = [layer for health, _ in found for layer in (health or {}).values()]
    ratios = [layer["max_min"] for layer in evaluated]
    val = None
    if all(health is not None for health, _ in found):
        val = {
            "entropy": min(layer["entropy"] for layer in evaluated),
            "max_min": None if None in ratios else max(ratios),
            "dead": max(layer["dead"] for layer in evaluated),
        }
    return {
        "val": val,
        "train": {"drop_rate": max((layer["drop_rate"] for layer in trained if "drop_rate" in layer), default=None)},
    }
