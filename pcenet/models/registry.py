"""Networks by name, whatever their task: what there is, its twin, its arguments, and making one.

Classifiers are registered with timm. Segmentation networks are not: timm's contract (pooling, classifier, feature
levels) has no meaning for them.
"""

from __future__ import annotations

from typing import Any

import timm

from pcenet.catalogue import list_bundled, weights_of
from pcenet.choices import TaskName
from pcenet.models.blocks import network_options
from pcenet.models.decoded import DecodedNet, decoded_options
from pcenet.models.hub import SavableModel
from pcenet.models.pcenet import PCENet, classifier_names
from pcenet.models.preprocessing import cost_of, image_size
from pcenet.models.timm_net import TimmNet, is_timm, timm_input_size
from pcenet.models.unet import INPUT_SIZE, UNETS, PCEUNet


def list_models(task: TaskName | None = None) -> list[str]:
    """Names of the networks of this package, PCE networks and twins.

    Every classifier is an encoder, too: see `DecodedNet` for names of the form "DECODER:ENCODER", which are not listed.

    Args:
        task: ``"classify"`` or ``"segment"``; None: both.
    """
    names = {"classify": classifier_names(), "segment": sorted(UNETS)}
    return names["classify"] + names["segment"] if task is None else names[task]


def task_of(name: str) -> TaskName:
    """What a network of that name is for."""
    return "classify" if is_timm(name) or name in list_models("classify") else "segment"


def twin_of(name: str) -> str | None:
    """Name of the dense twin of a PCE network; None for a dense network."""
    decoder, colon, network = name.rpartition(":")
    if not network.startswith("pce_"):
        return None
    return decoder + colon + network.replace("pce_", "dense_", 1).removesuffix("_spec")


def describe(name: str) -> dict[str, Any]:
    """What one of `list_models` is for, its own input size, its cost with fresh weights, and its twin's name."""
    model = create_network(name)
    about = {"name": name, "task": task_of(name), "input_size": list(image_size(model))}
    return about | cost_of(model) | {"twin": twin_of(name)}


def model_options(name: str) -> tuple[str, ...]:
    """Names of the arguments that shape the network of that name: stages, blocks, and the options of its layers.

    Raises:
        ValueError: for "timm:NAME", whose arguments only timm knows.
    """
    if is_timm(name):
        raise ValueError(f"model {name!r}: its arguments are timm's")
    if ":" in name:
        return decoded_options()
    return network_options(PCENet if task_of(name) == "classify" else PCEUNet)


def input_size_of(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network of that name is made for."""
    if is_timm(name):
        return timm_input_size(name)
    cfg = timm.get_pretrained_cfg(name) if task_of(name) == "classify" else None
    return INPUT_SIZE if cfg is None else cfg.input_size


def create_network(name: str, pretrained: bool = False, **arguments: Any) -> SavableModel:
    """Make a network.

    Args:
        name: see `list_models`, or "DECODER:ENCODER", or "timm:NAME" for a classifier of timm, see `TimmNet`.
        pretrained: load the weights that come with the package, see `bundled`. The network then has their number of
            classes and knows the classes' names; where ``num_classes`` says otherwise, its classifier is a fresh one.
            The first convolution is fitted to another number of channels. By default all weights are fresh.
        arguments: those of its class, and ``pretrained_cfg_overlay`` as in timm. Unlike `timm.create_model` this passes
            arguments on that are None.

    Raises:
        ValueError: for an unknown name, arguments that break their rules, or, where ``pretrained``, a network that no
            bundled weights are of, or arguments that they do not fit.
        TypeError: for an argument that the network does not have.
        ModuleNotFoundError: for "DECODER:ENCODER" where segmentation-models-pytorch is not installed.
    """
    if is_timm(name):
        return TimmNet(name, pretrained=pretrained, **arguments)
    if ":" not in name and name not in list_models():
        raise ValueError(f"architecture {name!r} is not a network of this package")
    if pretrained and not weights_of(name):
        raise ValueError(f"pretrained=True: {name} has no bundled weights; leave it out; {list_bundled()}")
    if ":" in name:
        return DecodedNet(name, **arguments)
    create = UNETS[name] if name in UNETS else timm.model_entrypoint(name)
    try:
        model: SavableModel = create(pretrained=pretrained, **arguments)
    except RuntimeError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the bundled weights of {name} do not fit {arguments}; leave out pretrained, or what they do not fit: "
            f"{error}"
        ) from error
    return model
