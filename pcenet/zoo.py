"""The table of networks that `pcenet models` and docs/models.md show: cost, score, speed, and what weights there are.

Scores and speed are stored in ``results.json``, which ``experiments/zoo.py`` makes of the raw results.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pcenet.catalogue import networks, weights_of
from pcenet.reporting.numbers import SCORES, score_digits

SPEEDS = ("step", "latency")  # of a training step, of one image, as `pcenet bench` calls them
TITLES = ("network", "weights", "score, %", "input", "multiply-adds", "parameters (active)", "time / twin's", "twin")


@cache
def results() -> dict[str, Any]:
    """What was measured of networks.

    Returns:
        ``"weights"``: by "DATA/NETWORK" the validation score of the weights that come with the package, and the mean
        over the seeds that were trained by their recipe, with half the width of its 95 % interval (None for one seed),
        and the input's size and multiply-adds there.
        ``"speed"``: the kind of machine, and by network the times of ``SPEEDS`` relative to the twin's.
    """
    return json.loads((Path(__file__).parent / "results.json").read_text(encoding="utf-8"))


def records() -> list[dict[str, Any]]:
    """All that is known of each network: what `pcenet models --json` prints."""
    measured = results()
    found = []
    for name, about in networks().items():
        tags = list(weights_of(name))
        scores = {tag: measured["weights"][f"{tag}/{name}"] for tag in tags if f"{tag}/{name}" in measured["weights"]}
        found.append(about | {"weights": tags, "scores": scores, "time": measured["speed"]["ratios"].get(name, {})})
    return found


def rows(task: str) -> list[list[str]]:
    """The cells under ``TITLES`` of the networks for a task, a row per network and weights, those with weights first.

    What was not measured is empty.
    """
    found = []
    for about in sorted((each for each in records() if each["task"] == task), key=lambda each: not each["weights"]):
        for tag in about["weights"] or [None]:
            score = about["scores"].get(tag)
            measured = score or about
            times = about["time"] if measured["input_size"] == about["input_size"] else {}  # those of its own size
            found.append(
                [
                    about["name"],
                    f"{tag}/{about['name']}" if tag else "none",
                    score_cell(score),
                    " x ".join(map(str, measured["input_size"])),
                    count_cell(measured["multiply_adds"]),
                    f"{about['parameters'] / 1e6:.2f} M ({about['active_parameters'] / 1e6:.2f} M)",
                    ", ".join(f"{times[speed]:.2f}" for speed in SPEEDS if speed in times),
                    about["twin"] or "",
                ]
            )
    return found


def score_cell(score: dict[str, Any] | None) -> str:
    """Such as "85.69 ± 0.61", "89.8" for one seed; no digit is finer than one image."""
    if score is None:
        return ""
    values = [score["mean"]] if score["half_width"] is None else [score["mean"], score["half_width"]]
    return " ± ".join(f"{100 * value:.{score_digits(score['images'])}f}" for value in values)


def of_seeds(score: dict[str, Any]) -> str:
    """What the score is a mean of."""
    if score["seeds"] == 1:
        return f"one seed trained for {score['epochs']} epochs"
    return f"mean of {score['seeds']} seeds trained for {score['epochs']} epochs, ± half its 95 % interval"


def count_cell(count: int) -> str:
    """Such as "35.2 M" or "1.97 G"."""
    return f"{count / 1e6:.1f} M" if count < 1e8 else f"{count / 1e9:.2f} G"


def legend() -> list[str]:
    """What the table says of itself, in lines: what was measured, on what."""
    measured = results()
    speed = measured["speed"]
    of_data = {
        f"{name.partition('/')[0]}: {SCORES[score['score']]} on the {score['images']} images of {score['split']},"
        f" {of_seeds(score)}."
        for name, score in measured["weights"].items()
    }
    return [
        "A network without weights has no score: none of its trained weights come with the package.",
        *sorted(of_data),
        f"Time of a training step, and of one image, relative to the twin's: {speed['processor']} ({speed['kind']}),"
        f" {speed['threads']} threads, {speed['precision']}, not compiled.",
    ]
