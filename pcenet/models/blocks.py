"""What the networks are made of: convolutions, residual blocks whose body is routed or dense, stem and stages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from pcenet.models.controls import mixed_double_conv
from pcenet.models.positions import PositionMap
from pcenet.models.stages import Stage
from pcenet.nn import PCELayer
from pcenet.nn.checks import check_at_least, is_number, is_plain
from pcenet.nn.experts import double_conv
from pcenet.nn.stacked import StackedBatchNorm

# What a network sets itself for each of its layers; everything else of PCELayer is an option of the network. So is the
# width inside an expert, which stages share as a ratio.
_SET_BY_NETWORK = {"in_channels", "out_channels", "patch_size", "hidden_channels", "dropout", "shortcut"}
LAYER_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(PCELayer).parameters.items()
    if name not in _SET_BY_NETWORK
} | {"expert_width": 1.0}


class SameConv2d(nn.Conv2d):
    """A convolution of as many outputs as its stride has steps in the map, rounded upwards: TensorFlow's padding
    ``"same"``. timm's rounds by ``math.ceil``, which a program of open sizes cannot be written down with.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, D, ceil(H / s), ceil(W / s)]``."""
        padding: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


class ConvNormAct(nn.Sequential):
    """``Conv -> BatchNorm -> GELU``; strides pad at the bottom and right, so that odd maps are halved upwards."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(
            SameConv2d(in_channels, out_channels, kernel_size, stride, bias=False)
            if stride > 1
            else nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
        )


class ResidualBlock(nn.Module):
    """``x + drop_path(body(x))``, nothing after the sum: where a patch was dropped the signal passes unchanged.

    Args:
        body: what it adds to its input.
        drop_path: stochastic depth, the share of images for which it adds nothing.
        position: what the body reads the input through; None: as it is.
    """

    def __init__(self, body: nn.Module, drop_path: float, position: nn.Module | None = None) -> None:
        super().__init__()
        self.position = position
        self.body = body
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        idle = is_plain(self.drop_path, nn.Identity) or (is_plain(self.drop_path, DropPath) and not self.training)
        read: Tensor = x if self.position is None else self.position(x)
        if idle and is_plain(self.body, PCELayer):  # which adds x in its last pass over the map
            out: Tensor = self.body(read, residual=x)
            return out
        return x + self.drop_path(self.body(read))


def network_options(network: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments that shape a network: stages, blocks, pooling, and the options of its layers."""
    set_by_others = {
        "in_chans",
        "num_classes",
        "drop_rate",
        "drop_path_rate",
        "device",
        "dtype",
        "layer_options",
        "self",
    }
    own = [name for name in inspect.signature(network.__init__).parameters if name not in set_by_others]
    return (*own, *LAYER_DEFAULTS)


def resolve_layer_options(network: nn.Module, given: dict[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """All options of the PCE layers of a network, none for a dense one.

    Raises:
        TypeError: for an option that `PCELayer` does not have.
        ValueError: for any option where no stage is routed; for an ``expert_width`` that is not positive.
    """
    unknown = sorted(given.keys() - LAYER_DEFAULTS.keys())
    if unknown:
        name, takes = type(network).__name__, network_options(type(network))
        raise TypeError(f"{name} got unexpected arguments {unknown}; it takes {', '.join(takes)}")
    if all(stage.patch_size is None for stage in stages):
        if given:
            raise ValueError(f"{', '.join(sorted(given))}: no effect on a dense network; leave out, or route a stage")
        return {}
    options = {**LAYER_DEFAULTS, **given}
    width = options["expert_width"]
    if not is_number(width) or not 0 < width < math.inf:
        raise ValueError(f"expert_width={width!r} must be a number above 0; 1 is the width of the stage")
    return options


def make_stem(in_chans: int, stage: Stage) -> nn.Sequential:
    """3x3 convolutions, one for each halving of the image and at least one."""
    check_at_least(1, in_chans=in_chans)
    halvings = stage.stride.bit_length() - 1
    steps = [2] * halvings or [1]
    widths = [in_chans] + [stage.width] * len(steps)
    return nn.Sequential(
        *(
            ConvNormAct(before, after, 3, stride)
            for (before, after), stride in zip(pairwise(widths), steps, strict=True)
        )
    )


def make_downsampling(before: Stage, stage: Stage) -> list[nn.Module]:
    """The convolution between two stages: none where neither stride nor width changes."""
    if (before.stride, before.width) == (stage.stride, stage.width):
        return []
    step = stage.stride // before.stride
    return [ConvNormAct(before.width, stage.width, step, step)]


def dense_body(stage: Stage, dropout: float) -> nn.Sequential:
    """What a dense block computes."""
    if stage.mixed_kernels is None:
        return double_conv(stage.width, stage.width, dropout=dropout)
    return mixed_double_conv(stage.width, stage.mixed_kernels, dropout)


def make_blocks(
    stage: Stage, drop_path_rates: Sequence[Any], dropout: float, options: dict[str, Any]
) -> list[nn.Module]:
    """The residual blocks of a stage, one per rate of stochastic depth; ``options`` are those of its PCE layers."""
    layer_options = {name: value for name, value in options.items() if name != "expert_width"}

    def body() -> nn.Module:
        if stage.patch_size is None:
            return dense_body(stage, dropout)
        return PCELayer(
            stage.width,
            stage.width,
            patch_size=stage.patch_size,
            hidden_channels=max(1, round(options["expert_width"] * stage.width)),
            dropout=dropout,
            shortcut=False,
            **layer_options,
        )

    def position() -> nn.Module | None:
        return None if stage.position_map is None else PositionMap(stage.width, stage.position_map)

    return [ResidualBlock(body(), rate, position()) for rate in drop_path_rates]


def stacked_norm_names(model: nn.Module) -> set[str]:
    """Parameters of the stacked normalisations: they are matrices ``[E, C]``, and yet no weights to decay."""
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, StackedBatchNorm)
        for name, _ in module.named_parameters()
    }
