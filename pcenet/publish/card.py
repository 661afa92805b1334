"""What a run says of its network on a model card, from the files of its folder. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from pcenet.catalogue import bundled
from pcenet.choices import TaskName
from pcenet.models.card import PIPELINE, plain
from pcenet.reporting.numbers import SCORES, in_prose, score_digits
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import SAFE_TO_CHANGE
from pcenet.runs.health import recorded_health
from pcenet.tasks.evaluation import in_words

PICTURE = "routing.png"
METRICS = {"top1": "accuracy", "miou": "mean_iou"}  # as the Hub calls them

Values = Mapping[str, Any]


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The options that ``pcenet train --config`` reads to train it again. No path of the machine that trained is in
    them: of files and folders the names are."""
    options = {key: value for key, value in asdict(config).items() if key not in SAFE_TO_CHANGE}
    for key in ("data", "classes", "init"):
        if isinstance(options[key], str) and options[key] not in bundled():
            options[key] = Path(options[key]).name
    return options


def score_of(figures: Values) -> str:
    """The figure of an evaluation that counts: a key of `pcenet.reporting.numbers.SCORES`."""
    return next(key for key in SCORES if key in figures)


def data_of(metrics: Values) -> str:
    """What the run was trained on, without the folders that it lies in."""
    return Path(metrics["data"]).name


def by_label(metrics: Values, evaluations: Sequence[Values]) -> dict[str, Values]:
    """What was measured, by the names of images and split: on the validation images by training, unless `pcenet eval`
    was asked again; and all else that that was asked. Other images of a name have a number behind it.

    Args:
        metrics: the run's ``metrics.json``.
        evaluations: its ``eval-*.json``.
    """
    own = {
        "data": data_of(metrics),
        "source": metrics["data"],
        "split": "val",
        "router": recorded_health(metrics)[0],
    } | dict(metrics["val"])
    known = metrics.get("fingerprint", {}).get("val")
    again = [each for each in evaluations if is_again(each, own, known)]
    found: dict[str, Values] = {}
    for each in [*(again[-1:] or [own]), *(each for each in evaluations if each not in again)]:
        name, measured = plain(each["data"]), in_words(each["split"], each.get("tta", False))
        names = (name if number == 1 else f"{name} ({number})" for number in count(1))
        found[next(label for label in (f"{n}, {measured}" for n in names) if label not in found)] = each
    return found


def is_again(evaluation: Values, own: Values, known: Any) -> bool:
    """Whether an evaluation is of the validation images of training: by their number alone where no more is noted.
    Those of another path, which may be copies of other content, are not."""
    if (evaluation["data"], evaluation["split"]) != (own["data"], "val") or evaluation.get("tta", False):
        return False
    if evaluation.get("source", own["source"]) != own["source"]:
        return False
    images = evaluation.get("fingerprint", {}).get("val")
    return bool(images == known if images and known else evaluation["images"] == own["images"])


def score_section(metrics: Values, evaluations: Sequence[Values], twin: Values | None) -> str:
    """The scores, of validation and of what ``pcenet eval`` measured, and the twin's beside the former.

    Args:
        metrics: the run's ``metrics.json``.
        evaluations: its ``eval-*.json``.
        twin: the twin's ``metrics.json``, if there is a twin.
    """
    val = metrics["val"]
    score = score_of(val)
    lines = (
        f"| {label} | {each['images']} | {in_prose(each[score], each['images'])} |"
        for label, each in by_label(metrics, evaluations).items()
    )
    table = "\n".join((f"| data | images | {SCORES[score]} |", "|---|---|---|", *lines))
    text = f"## Score\n\n{table}"
    if twin is not None:
        theirs = in_prose(twin["val"][score], val["images"])
        digits = score_digits(val["images"])
        ahead = round(100 * (val[score] - twin["val"][score]), digits)
        apart = f"{abs(ahead):.{digits}f} points"
        where = f"{apart} {'ahead of' if ahead > 0 else 'behind'} it" if ahead else "level with it"
        text += (
            f"\n\nIts dense twin `{twin['model']}`, the same network with a plain double convolution in place of each "
            f"PCE layer, has {theirs} on the validation images: PCE is {where}, in one run of each."
        )
    return text


def cost_section(name: str, cost: Values, twin: tuple[str, Values] | None, size: tuple[int, int]) -> str:
    """Parameters and multiply-adds, and the twin's where they are known.

    Args:
        name: of the network.
        cost: its cost, as ``metrics.json`` has it.
        twin: the dense twin's name and cost, if they are known.
        size: height and width of the images.
    """

    def row(name: str, cost: Values) -> str:
        millions = (cost[key] / 1e6 for key in ("parameters", "active_parameters", "multiply_adds"))
        return f"| {name} |" + "".join(f" {number:.2f} M |" for number in millions)

    rows = [row(f"`{name}`", cost)] + ([row(f"`{twin[0]}`, its dense twin", twin[1])] if twin is not None else [])
    return (
        f"## Cost\n\nOf one image of {size[0]} x {size[1]} px; active is what one patch meets on its way.\n\n"
        "| | parameters | active | multiply-adds |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def routing_section(metrics: Values, evaluations: Sequence[Values], picture: bool) -> str:
    """Which experts are in use, and the picture.

    Args:
        metrics: the run's ``metrics.json``; one of a version that counted in training only has no shares.
        evaluations: its ``eval-*.json``.
        picture: whether there is one.

    Returns:
        The section; empty where there is nothing to show, as for a dense network.
    """
    training = recorded_health(metrics)[1]
    if not training:
        return ""
    columns = {
        label: each["router"]
        for label, each in by_label(metrics, evaluations).items()
        if each["router"] and each["router"].keys() >= training.keys() and not each.get("tta", False)
    }
    rows = [
        f"| `{layer}` | " + " | ".join(", ".join(map(rounded, router[layer]["load"])) for router in columns.values())
        for layer in training
    ]
    parts = []
    if columns:
        header = f"| layer | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|\n"
        table = header + "\n".join(f"{row} |" for row in rows)
        parts.append(f"Shares of the patches that each expert of a layer gets at evaluation:\n\n{table}")
    if picture:
        titles = (
            " Above each image: the network's answer, and the truth in brackets." if "top1" in metrics["val"] else ""
        )
        parts.append(
            f"![Which expert served which patch]({PICTURE})\n\n*Images of the validation data, and below them which "
            f"expert of each layer served which patch: hue by expert, stronger where the router is surer.{titles}*"
        )
    return "\n\n".join(["## Routing", *parts]) if parts else ""


def rounded(share: float) -> str:
    """A share in whole per cent, such as "25 %"."""
    return f"{share:.0%}".replace("%", " %")


def training_section(config: TrainConfig, metrics: Values, environment: Values) -> str:
    """What it was trained on, and how."""
    epochs = "1 epoch" if metrics["epochs"] == 1 else f"{metrics['epochs']} epochs"
    if metrics.get("weights_of_epoch", metrics["epochs"]) != metrics["epochs"]:
        epochs += f" (the weights are those of epoch {metrics['weights_of_epoch']})"
    versions = ", ".join(f"{part} {environment['versions'][part]}" for part in ("torch", "timm"))
    options = yaml.safe_dump(recipe(config), sort_keys=False).strip()
    return f"""## Training

On {plain(data_of(metrics))}, {epochs}, with pcenet {environment["pcenet"]}, {versions}, {environment["precision"]} \
on {environment["device"]}. The recipe, as `pcenet train --config` reads it:

```yaml
{options}
```"""


def results(task: TaskName, metrics: Values) -> list[EvalResult]:
    """The validation score for the Hub's own tables."""
    score = score_of(metrics["val"])
    return [
        EvalResult(
            task_type=PIPELINE[task],
            dataset_type=data_of(metrics),
            dataset_name=data_of(metrics),
            dataset_split="val",
            metric_type=METRICS[score],
            metric_name=SCORES[score],
            metric_value=round(metrics["val"][score], 4),
        )
    ]
