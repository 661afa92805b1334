"""What options mean together: combinations that are refused, and how long a time is."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING

from pcenet.choices import TaskName

if TYPE_CHECKING:
    from pcenet.runs.config import TrainConfig

# Options that say how long a schedule takes, and those without which there is none.
LASTS = {
    "temperature_epochs": ("temperature", 1.0),
    "balance_epochs": ("balance_start", None),
    "router_noise_epochs": ("router_noise", 0.0),
}
MIXING = ("mixup", "cutmix")
# Options of one task alone.
TO_CLASSIFY = ("mixup", "random_erasing")
TO_SEGMENT = ("classes", "ignore_index", "class_weights", "min_scale", "max_scale", "jitter")


def duration(text: str) -> timedelta:
    """A time as ``DD:HH:MM:SS``, with or without its leading parts, or as a number of minutes.

    >>> duration("1:30:00") == duration("90") == timedelta(minutes=90)
    True

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    time = timedelta()
    with suppress(OverflowError, ValueError):  # as for more digits than a number may have
        if re.fullmatch(r"\d+(\.\d+)?", text):
            time = timedelta(minutes=float(text))
        elif re.fullmatch(r"\d+(:\d\d){1,3}", text):
            days, hours, minutes, seconds = [0, 0, 0, *map(int, text.split(":"))][-4:]
            time = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if not time:
        raise ValueError(
            "max_time must be a time such as 1:30:00 (DD:HH:MM:SS) or 90 (minutes), above 0 and under 999999999 days,"
            f" got {text!r}"
        )
    return time


def check_together(config: TrainConfig) -> None:
    """Raise a ``ValueError`` that names the first two options of a training run that do not go together."""
    if config.max_time is not None:
        duration(config.max_time)
    check_start(config)
    if config.horizontal_flip and config.augment == "none":
        raise ValueError("horizontal_flip has no effect with augment 'none': leave one of them out")
    for name, (start, off) in LASTS.items():
        if getattr(config, name) is not None and getattr(config, start) == off:
            raise ValueError(f"{name} {getattr(config, name):g} has no effect without {start}: give both, or neither")
    kind, names = ("segmentation", TO_SEGMENT) if config.task == "classify" else ("classification", TO_CLASSIFY)
    for item in fields(config):
        if item.name in names and getattr(config, item.name) != item.default:
            raise ValueError(f"{item.name} is for {kind}: leave it out to {config.task}")
    for name in MIXING:
        if getattr(config, name) and config.batch_size == 1:
            raise ValueError(f"{name} mixes the images of a batch, so batch_size must be at least 2, got 1")
    if config.overfit is not None:
        check_overfit(config)
    if config.dry_run and config.find != "none":
        raise ValueError(f"dry_run and find {config.find!r} exclude each other: both end without a run; give one")
    if config.find != "none" and config.devices > 1:
        raise ValueError(f"find {config.find!r} tries one process alone, got devices {config.devices}: leave that out")


def check_start(config: TrainConfig) -> None:
    """What a network starts from: one set of weights, and experts only where there is something to copy."""
    if config.pretrained and config.init is not None:
        raise ValueError("pretrained and init are both weights to start from: give one of them")
    if config.upcycle and not config.model_name.startswith("timm:"):
        raise ValueError(f"upcycle is for networks of timm, not for {config.model_name}: give --model timm:NAME")
    if config.upcycle_args and not config.upcycle:
        raise ValueError("upcycle_args have no effect without upcycle: give both, or neither")


def check_overfit(config: TrainConfig) -> None:
    """Overfitting shows whether a network can learn some images as they are: nothing may change them."""
    for name in (*MIXING, "random_erasing"):
        if getattr(config, name):
            raise ValueError(f"{name} changes the images, and overfit learns them as they are: leave one of them out")
    if config.augment not in ("auto", "none"):
        raise ValueError(
            f"augment {config.augment!r} changes the images, and overfit learns them as they are: leave one of them out"
        )


def check_input_size(value: int | str | None, task: TaskName) -> None:
    """Raise a ``ValueError`` unless the images of a task can have this size."""
    if value is None or re.fullmatch("[1-9][0-9]*", str(value)):
        return
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", str(value)):
        rule = "pixels, such as 224, or to segment HEIGHTxWIDTH, such as 192x256"
        raise ValueError(f"input_size must be {rule}; got {value!r}")
    if task == "classify":
        raise ValueError(f"input_size {value!r}: images to classify are square; give one number")
