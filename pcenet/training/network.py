"""The network that a run asks for: its name, its arguments, and errors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pcenet.choices import did_you_mean
from pcenet.models import SavableModel, create_network, list_models, model_options
from pcenet.training.config import TrainConfig

DECIDED_ELSEWHERE = {
    "num_classes": "the data decide it",
    "in_chans": "images are read as RGB",
    "drop_rate": "give --drop",
    "drop_path_rate": "give --drop-path",
}


def check_model(config: TrainConfig) -> None:
    """Raise a ``ValueError`` for a model, or an argument of it, that does not exist; it names the nearest."""
    names, options = list_models(), model_options(config.model)
    if config.model not in names:
        raise ValueError(f"model {config.model!r} is unknown{did_you_mean(config.model, names)}")
    for name in config.model_args:
        if name in DECIDED_ELSEWHERE:
            raise ValueError(f"model_args: {name} cannot be given there: {DECIDED_ELSEWHERE[name]}")
        if name not in options:
            hint = did_you_mean(str(name), options)
            raise ValueError(f"model_args: unknown argument {name!r}; a network takes {', '.join(options)}{hint}")


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
    model = create_network(
        config.model,
        num_classes=num_classes,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
        pretrained_cfg_overlay={"input_size": (3, config.input_size, config.input_size)},
        **config.model_args,
    )
    return model.to(memory_format=torch.channels_last)
