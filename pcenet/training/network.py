"""The network that a run asks for: its name, its arguments, and errors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pcenet.choices import did_you_mean
from pcenet.models import SavableModel, create_network, input_size_of, list_models, model_options, split_name, task_of
from pcenet.training.config import TrainConfig

DECIDED_ELSEWHERE = {
    "num_classes": "the data decide it",
    "in_chans": "images are read as RGB",
    "drop_rate": "give --drop",
    "drop_path_rate": "give --drop-path",
}


def check_model(config: TrainConfig) -> None:
    """Raise a ``ValueError`` for a model, or an argument of it, that does not exist; it names the nearest."""
    name, names = config.model_name, list_models()
    if ":" in name:
        split_name(name)
    elif name not in names:
        raise ValueError(f"model {name!r} is unknown{did_you_mean(name, list_models(config.task))}")
    if task_of(name) != config.task:
        raise ValueError(f"model {name!r} is made to {task_of(name)}; give --task {task_of(name)}, or another --model")
    options = model_options(name)
    for argument in config.model_args:
        if argument in DECIDED_ELSEWHERE:
            raise ValueError(f"model_args: {argument} cannot be given there: {DECIDED_ELSEWHERE[argument]}")
        if argument not in options:
            hint = did_you_mean(str(argument), options)
            raise ValueError(f"model_args: unknown argument {argument!r}; a network takes {', '.join(options)}{hint}")


@contextmanager
def naming_model_args(values: dict[str, Any]) -> Iterator[None]:
    """Turn what a network raises for arguments that do not fit into a ``ValueError`` that names ``model_args``."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if not values:
            raise
        raise ValueError(f"model_args {values} make no network: {error}") from error


def build_model(config: TrainConfig, num_classes: int) -> SavableModel:
    """The untrained network; its weights depend on the state of torch's generator alone."""
    overlay = {} if config.size is None else {"input_size": (3, *config.size)}
    model = create_network(
        config.model_name,
        num_classes=num_classes,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
        pretrained_cfg_overlay=overlay,
        **config.model_args,
    )
    return model.to(memory_format=torch.channels_last)


def default_input_size(name: str) -> int | str:
    """The image size that the network of that name is made for, as `TrainConfig` writes it."""
    _, height, width = input_size_of(name)
    return height if height == width else f"{height}x{width}"
