"""The network that a run asks for: its name, its arguments, and errors that name them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcenet.catalogue import CONFIG, check_network, networks
from pcenet.choices import did_you_mean
from pcenet.models import (
    SavableModel,
    TimmNet,
    check_timm,
    create_network,
    input_size_of,
    is_timm,
    like_timm,
    list_models,
    model_options,
    split_name,
    task_of,
)
from pcenet.models.hub import check_patches, check_tensors, read_config, read_weights
from pcenet.models.limits import check_image_shape
from pcenet.models.pretrained import WEIGHTS
from pcenet.runs.config import TrainConfig
from pcenet.runs.finding import find_model
from pcenet.runtime.memory import ran_out_of_memory

log = logging.getLogger(__name__)
OF_TRAINING = {"drop_rate", "drop_path_rate", "dropout", "capacity_factor"}  # arguments that change no prediction
DECIDED_ELSEWHERE = {
    "num_classes": "the data decide it",
    "in_chans": "images are read as RGB",
    "drop_rate": "give --drop",
    "drop_path_rate": "give --drop-path",
    "pretrained": "give --pretrained",
    "upcycling": "give --upcycle and --upcycle-args",
}


def check_model(config: TrainConfig) -> None:
    """Raise a ``ValueError`` for a model, or an argument of it, that does not exist; it names the nearest."""
    name = config.model_name
    check_network(name, config.task)
    if is_timm(name):
        check_timm(name)
    elif ":" in name:
        split_name(name)
    elif name not in networks():
        timms = like_timm(name) if config.task == "classify" else ""
        raise ValueError(f"model {name!r} is unknown{timms or did_you_mean(name, list_models(config.task))}")
    if task_of(name) != config.task:
        raise ValueError(f"model {name!r} is made to {task_of(name)}; give --task {task_of(name)}, or another --model")
    options = None if is_timm(name) else model_options(name)
    for argument in config.model_args:
        if argument in DECIDED_ELSEWHERE:
            raise ValueError(f"model_args: {argument} cannot be given there: {DECIDED_ELSEWHERE[argument]}")
        if options is not None and argument not in options:
            hint = did_you_mean(str(argument), options)
            raise ValueError(f"model_args: unknown argument {argument!r}; a network takes {', '.join(options)}{hint}")


@contextmanager
def naming_model_args(values: dict[str, Any]) -> Iterator[None]:
    """Turn what a network raises for arguments that do not fit into a ``ValueError`` that names ``model_args``."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if not values or ran_out_of_memory(error):
            raise
        raise ValueError(f"model_args {values} make no network: {error}") from error


def build_model(config: TrainConfig, classes: Sequence[str], start: bool = True) -> SavableModel:
    """The network before training; fresh weights depend on the state of torch's generator alone.

    Args:
        config: the options.
        classes: the class names of the data. Where the weights were trained on others, and say so, the classifier is
            initialised anew, even if the number of classes is the same.
        start: load the weights that the options name; False where a checkpoint brings others anyway.

    Raises:
        ValueError: for weights that do not fit, or a network in which nothing can be upcycled.
        FileNotFoundError: if there are no weights where ``config.init`` points.
    """
    overlay = {} if config.size is None else {"input_size": (3, *config.size)}
    if overlay:
        check_image_shape(overlay["input_size"])  # as when it will be loaded
    with naming_model_args(config.model_args):
        make = partial(
            create_network,
            config.model_name,
            num_classes=len(classes),
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            pretrained_cfg_overlay=overlay,
            **config.model_args,
        )
        model = make(pretrained=config.pretrained and start)
        check_patches(model)
    if model.class_names is not None and model.class_names != list(classes):
        model.load_state_dict({**model.state_dict(), **classifier_of(make(pretrained=False))})
    if config.init is not None and start:
        start_from(model, config.init, classes)
    if config.upcycle:
        assert isinstance(model, TimmNet)
        try:
            model.upcycle(**config.upcycle_args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"upcycle_args {config.upcycle_args}: {error}") from error
    return model.to(memory_format=torch.channels_last)


def classifier_of(model: SavableModel) -> dict[str, Tensor]:
    """The tensors of a network's last layer, by their names in its state."""
    # Classifiers have timm's get_classifier, which their common base class does not declare.
    last = model.get_submodule("head") if model.task == "segment" else model.get_classifier()  # type: ignore[operator]
    classifier = {id(parameter) for parameter in last.parameters()}
    return {key: each.detach() for key, each in model.state_dict(keep_vars=True).items() if id(each) in classifier}


def start_from(model: SavableModel, name: str, classes: Sequence[str]) -> None:
    """Load the weights of a run or model folder into a network; a classifier of other classes keeps its own.

    Arguments that change what the weights compute, such as another border, are the caller's to choose, and told of.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for weights that do not fit, naming the first tensor.
    """
    folder, _ = find_model(name, "init")
    path = folder / WEIGHTS
    weights = read_weights(path)
    try:
        about = read_config(folder / CONFIG)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"init: {folder / CONFIG} is no configuration of a PCE network: {error}") from error
    names = about.get("label_names")
    others = names is not None and names != list(classes)
    for key, tensor in classifier_of(model).items():
        if key in weights and (others or weights[key].shape != tensor.shape):
            weights[key] = tensor
    check_tensors(weights, model, f"init: {path} does not fit the network", "give a run of the same network")
    model.load_state_dict(weights)
    trained, own = about["model_args"], json.loads(json.dumps(model.model_args))
    both = sorted(own.keys() & trained.keys() - OF_TRAINING)
    if changed := [key for key in both if own[key] != trained[key]]:
        theirs, ours = (json.dumps({key: arguments[key] for key in changed}) for arguments in (trained, own))
        log.warning(
            "init: the weights compute something else here: %s has --model-args '%s', not %s", name, theirs, ours
        )


def default_input_size(name: str) -> int | str:
    """The image size that the network of that name is made for, as `TrainConfig` writes it."""
    _, height, width = input_size_of(name)
    return height if height == width else f"{height}x{width}"
