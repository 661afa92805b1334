"""The PCE networks for classification and their dense twins, registered with timm.

A network is a stem, stages of residual blocks and a head. The body of a block is a PCE layer in a routed stage and a
plain double convolution in a dense one; a twin is the same network with every stage dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, register_notrace_module
from timm.models import DefaultCfg, build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pcenet.catalogue import weights_of
from pcenet.models.blocks import (
    SameConv2d,
    make_blocks,
    make_downsampling,
    make_stem,
    resolve_layer_options,
    stacked_norm_names,
)
from pcenet.models.hub import SavableModel
from pcenet.models.positions import position_map_names
from pcenet.models.pretrained import class_names_of, record_of
from pcenet.models.stages import dense, make_stages
from pcenet.nn import PCEConv2d, PCELayer

# Control flow that depends on shapes and counts: symbolic tracing takes such a module as one node.
register_notrace_module(SameConv2d)
register_notrace_module(PCELayer)
register_notrace_module(PCEConv2d)


class PCENet(SavableModel):
    """A convolutional network whose stages are routed by PCE layers, with timm's usual contract.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling type; ``""`` leaves pooling out.
        strides: pixels of the image per pixel of each stage's map; the first one is the stem's.
        depths: blocks per stage.
        widths: channels per stage.
        patch_sizes: patch side per stage in pixels of its map, None for a dense stage; see `make_stages` for the rule.
        position_maps: per stage, the side of the learned map that each block adds to what its body reads, in pixels;
            None for a stage, or for all: no map.
        mixed_kernels: of dense stages, for controls: the number of kernels that each convolution mixes for each image
            (CondConv); None for a stage, or for all: one.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dropout: inside the blocks, between their convolutions.
        device, dtype: of the parameters.
        layer_options: further arguments of every `PCELayer`: ``num_experts``, ``top_k``, ``border``, ``gate`` ...
            And ``expert_width``, channels inside an expert by those of its stage, 1 by default; ``top_k=2`` with 0.5
            costs as much as ``top_k=1``.
            (`timm.create_model` drops arguments that are None: for ``capacity_factor`` give it the number of experts,
            which drops nothing either.)

    Raises:
        TypeError: for an option that `PCELayer` does not have.
        ValueError: where stages or options break their rules.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (32, 64, 128, 256),
        patch_sizes: Sequence[int | None] = (14, 7, 2, None),
        position_maps: Sequence[int | None] | None = None,
        mixed_kernels: Sequence[int | None] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        stages = make_stages(strides, depths, widths, patch_sizes, position_maps, mixed_kernels)
        controls = {"position_maps": position_maps, "mixed_kernels": mixed_kernels}
        options = resolve_layer_options(self, layer_options, stages)
        self.model_args = {
            "in_chans": in_chans,
            "global_pool": global_pool,
            "strides": list(strides),
            "depths": list(depths),
            "widths": list(widths),
            "patch_sizes": list(patch_sizes),
            **{name: list(values) for name, values in controls.items() if values is not None},
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "dropout": dropout,
            **options,
        }
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.stem = make_stem(in_chans, stages[0])
        self.feature_info: list[dict[str, Any]] = []
        self.stages = nn.Sequential()
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        before = stages[0]
        for index, stage in enumerate(stages):
            self.stages.append(
                nn.Sequential(
                    *make_downsampling(before, stage),
                    *make_blocks(stage, rates[: stage.depth], dropout, options),
                )
            )
            self.feature_info.append({"num_chs": stage.width, "reduction": stage.stride, "module": f"stages.{index}"})
            rates, before = rates[stage.depth :], stage
        self.num_features = stages[-1].width
        self.norm: nn.Module = nn.Sequential(nn.BatchNorm2d(self.num_features), nn.GELU())
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.to(device=device, dtype=dtype)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features, which the classifier reads."""
        return self.head.num_features

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The stacked normalisations, see ``stacked_norm_names``, and learned positions."""
        return stacked_norm_names(self) | position_map_names(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters by depth: by stage if coarse, else by block."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: activations inside the stages are computed again in the backward pass.

        As with every network in PyTorch, batch normalisation then updates its running statistics twice per step.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for another number of classes, 0 for none; ``global_pool=None`` keeps the pooling."""
        self.num_classes = num_classes
        self.class_names = None
        if global_pool is not None:
            self.model_args["global_pool"] = global_pool
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))

    def _forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and those of chosen stages.

        Args:
            x: images ``[B, C, H, W]``.
            indices: stages to take; an int takes that many of the last ones, None all.
            norm: apply the final normalisation to the last stage's features.
            stop_early: do not run stages after the last one taken.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW'")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        end = last_taken if stop_early else last
        intermediates: list[Tensor] = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: end + 1]):
            x = self._forward_stage(stage, x)
            if index in take:
                intermediates.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if end == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what the features of the given stages do not need; returns the stages' indices."""
        take, last_taken = feature_take_indices(len(self.stages), indices)
        shortened = last_taken < len(self.stages) - 1
        self.pruned = self.pruned or shortened or prune_norm
        self.stages = self.stages[: last_taken + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last_taken]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to the last stage's normalised features ``[B, num_features, h, w]``."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._forward_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits ``[B, num_classes]``, or to the pooled features before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


def _cfg(side: int, pool: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (pool, pool),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


_NANO_CFG = _cfg(32, 8, num_classes=10)
_LARGE_CFG = _cfg(224, 7)

_CFGS = {
    f"{kind}_{size}{suffix}": cfg
    for size, cfg, suffixes in (
        ("nano", _NANO_CFG, ("", "_spec")),
        ("tiny", _LARGE_CFG, ("", "_spec")),
        ("small", _LARGE_CFG, ("", "_spec")),
        ("nano_s2", _cfg(256, 32), ("",)),
        ("tiny_s2", _cfg(256, 16), ("",)),
    )
    for kind, suffix in (*(("pce", suffix) for suffix in suffixes), ("dense", ""))
} | dict.fromkeys(("dense_nano_wide", "dense_nano_position", "dense_nano_condconv"), _NANO_CFG)


def _with_weights(name: str, cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """timm's records of a network: one named "NETWORK.TAG" for each of its bundled weights, else that without any."""
    tagged = {f"{name}.{tag}": cfg | record_of(tag, folder) for tag, folder in weights_of(name).items()}
    return tagged or {name: cfg}


def make_default_cfgs() -> dict[str, DefaultCfg]:
    """timm's records of the networks of this file by name, with the weights that come with the package."""
    return generate_default_cfgs({key: c for name, cfg in _CFGS.items() for key, c in _with_weights(name, cfg).items()})


default_cfgs = make_default_cfgs()

# Patches cover 8, 4 px of a 32 px image: small ones win on CIFAR-10, and a routed first stage costs time alone
# (docs/trials.md). Those of `_TINY` and `_SMALL` cover 56, 56, 32 px of a 224 px one; a pixel at stride 32 has
# nothing to route by, so that stage is dense.
_NANO = {"strides": (1, 2, 4), "depths": (1, 1, 1), "widths": (24, 48, 96), "patch_sizes": (None, 4, 1)}
# An island of one pixel would see nothing.
_NANO_ISLANDS = {**_NANO, "patch_sizes": (16, 4, 2)}
# As many parameters in all as `pce_nano`.
_NANO_WIDE = {**_NANO, "widths": (48, 88, 184)}
_TINY = {
    "strides": (4, 8, 16, 32),
    "depths": (2, 2, 3, 2),
    "widths": (32, 64, 128, 256),
    "patch_sizes": (14, 7, 2, None),
}
_SMALL = {
    "strides": (4, 8, 16, 32),
    "depths": (2, 2, 8, 2),
    "widths": (48, 96, 192, 384),
    "patch_sizes": (14, 7, 2, None),
}
# For segmentation, whose decoders take strides that double from 2. Patches cover 64, 32, 32 and 64, 64, 32, 32 px, and
# divide the maps of images whose sides are multiples of 64 px, such as 192x256.
_NANO_S2 = {"strides": (2, 4, 8), "depths": (1, 1, 1), "widths": (24, 48, 96), "patch_sizes": (32, 8, 4)}
_TINY_S2 = {
    "strides": (2, 4, 8, 16),
    "depths": (2, 2, 3, 2),
    "widths": (32, 64, 128, 256),
    "patch_sizes": (32, 16, 4, 2),
}
# As in the twin, both convolutions see neighbouring pixels, which pays (docs/trials.md).
_ROUTED = {"border": "exchange"}
# A batch of a few large images has few patches in its first stages, whose loads vary more from batch to batch: room for
# twice the fair share, as in the U-shaped networks.
_ROOM = {**_ROUTED, "capacity_factor": 2.0}
# The specification to the letter: a patch is an island, scaled by its probability.
_SPEC = {"border": "zero", "gate": "prob", "top_k": 1, "balancing": "none", "shared_kernel": False}


def _create(variant: str, pretrained: bool, arguments: dict[str, Any], given: dict[str, Any]) -> PCENet:
    levels = len(given.get("strides", arguments["strides"]))
    wanted = given.get("out_indices")
    if isinstance(wanted, Sequence) and wanted and max(wanted) >= levels:
        raise ValueError(
            f"out_indices={tuple(wanted)}: {variant} has {levels} levels of features, 0 to {levels - 1}; with "
            f"segmentation-models-pytorch give encoder_depth={levels}"
        )
    model = build_model_with_cfg(
        PCENet,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(levels)), "flatten_sequential": True},
        **{**arguments, **given},
    )
    if pretrained and isinstance(model, PCENet):  # not so with features_only, which has no classes
        model.class_names = class_names_of(model.pretrained_cfg, model.num_classes)
    return model


@register_model
def pce_nano(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """PCE for 32 px images, about 35 M multiply-adds."""
    return _create("pce_nano", pretrained, {**_NANO, **_ROUTED}, kwargs)


@register_model
def pce_nano_spec(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`pce_nano` to the letter of the specification: isolated patches, gate = probability."""
    return _create("pce_nano_spec", pretrained, {**_NANO_ISLANDS, **_SPEC}, kwargs)


@register_model
def dense_nano(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """The dense twin of `pce_nano`."""
    return _create("dense_nano", pretrained, dense(_NANO), kwargs)


@register_model
def dense_nano_wide(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`dense_nano`, so much wider that it has the parameters of `pce_nano`, at 3.6 times the multiply-adds."""
    return _create("dense_nano_wide", pretrained, dense(_NANO_WIDE), kwargs)


@register_model
def dense_nano_position(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`dense_nano` with a learned map of positions in the stages that `pce_nano` routes: a control."""
    return _create("dense_nano_position", pretrained, {**dense(_NANO), "position_maps": (None, 16, 8)}, kwargs)


@register_model
def dense_nano_condconv(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`dense_nano` with four kernels, mixed for each image, in the stages that `pce_nano` routes: a rival."""
    return _create("dense_nano_condconv", pretrained, {**dense(_NANO), "mixed_kernels": (None, 4, 4)}, kwargs)


@register_model
def pce_tiny(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """PCE for 224 px images, about 0.6 G multiply-adds."""
    return _create("pce_tiny", pretrained, {**_TINY, **_ROUTED}, kwargs)


@register_model
def pce_tiny_spec(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`pce_tiny` to the letter of the specification."""
    return _create("pce_tiny_spec", pretrained, {**_TINY, **_SPEC}, kwargs)


@register_model
def dense_tiny(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """The dense twin of `pce_tiny`."""
    return _create("dense_tiny", pretrained, dense(_TINY), kwargs)


@register_model
def pce_small(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """PCE for 224 px images, about 2 G multiply-adds."""
    return _create("pce_small", pretrained, {**_SMALL, **_ROUTED}, kwargs)


@register_model
def pce_small_spec(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """`pce_small` to the letter of the specification."""
    return _create("pce_small_spec", pretrained, {**_SMALL, **_SPEC}, kwargs)


@register_model
def dense_small(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """The dense twin of `pce_small`."""
    return _create("dense_small", pretrained, dense(_SMALL), kwargs)


@register_model
def pce_nano_s2(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """PCE as an encoder for segmentation, strides 2 to 8, about 430 M multiply-adds at 192x256."""
    return _create("pce_nano_s2", pretrained, {**_NANO_S2, **_ROOM}, kwargs)


@register_model
def dense_nano_s2(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """The dense twin of `pce_nano_s2`."""
    return _create("dense_nano_s2", pretrained, dense(_NANO_S2), kwargs)


@register_model
def pce_tiny_s2(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """PCE as an encoder for segmentation, strides 2 to 16, about 2.2 G multiply-adds at 192x256."""
    return _create("pce_tiny_s2", pretrained, {**_TINY_S2, **_ROOM}, kwargs)


@register_model
def dense_tiny_s2(pretrained: bool = False, **kwargs: Any) -> PCENet:
    """The dense twin of `pce_tiny_s2`."""
    return _create("dense_tiny_s2", pretrained, dense(_TINY_S2), kwargs)


def classifier_names() -> list[str]:
    """Names of the networks of this file, as registered with timm."""
    return timm.list_models(module=__name__.rpartition(".")[2])
