"""What images a network asks for, and what one of them costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import timm.data
from torch import Tensor, nn

from pcenet.models.complexity import complexity


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the images that a model is made for."""
    _, height, width = preprocessing(model)["input_size"]
    return int(height), int(width)


def image_side(model: nn.Module) -> int:
    """Side in pixels of the square images that a classifier is made for."""
    return image_size(model)[1]


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Input size, mean and standard deviation that a timm model's ``pretrained_cfg`` asks for.

    Raises:
        ValueError: if it takes other images than those of three channels, which all images are read as.
    """
    resolved: dict[str, Any] = timm.data.resolve_model_data_config(model)
    found = {"in_chans": getattr(model, "model_args", {}).get("in_chans", 3)}
    found |= {name: len(resolved[name]) for name in ("mean", "std")}
    for name, channels in found.items():
        if channels != 3 and (name == "in_chans" or channels != 1):
            raise ValueError(
                f"{name} of the network is for {channels} channels; images are read as RGB, which has three"
            )
    return resolved


def as_pixels(inputs: Tensor, model: nn.Module) -> Tensor:
    """Images ``[..., 3, H, W]`` that were normalised for a model as values from 0 to 1."""
    values = preprocessing(model)
    mean, std = (inputs.new_tensor(values[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (inputs * std + mean).clamp(0, 1)


def cost_of(model: nn.Module) -> dict[str, Any]:
    """What one image of the model's own size costs: `pcenet.models.Complexity` as JSON can hold it."""
    cost = complexity(model, (3, *image_size(model)))
    return asdict(cost) | {"router_share": cost.router_share, "routed_share": cost.routed_share}
