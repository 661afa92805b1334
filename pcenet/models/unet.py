"""The U-shaped PCE networks for semantic segmentation and their dense twins.

A network is a stem, stages of residual blocks on the way down, the same stages again on the way up, and a classifier of
pixels. A level of the way up is added to the same level of the way down, not concatenated: the blocks of both ways are
then equal, and a dropped patch keeps the signal of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import load_pretrained
from torch import Tensor, nn

from pcenet.catalogue import weights_of
from pcenet.models.blocks import make_blocks, make_downsampling, make_stem, resolve_layer_options, stacked_norm_names
from pcenet.models.hub import SavableModel
from pcenet.models.limits import check_pixel_classes
from pcenet.models.positions import position_map_names
from pcenet.models.pretrained import class_names_of, record_of
from pcenet.models.stages import dense, make_stages

INPUT_SIZE = (3, 192, 256)


class UpLevel(nn.Module):
    """One level of the way up: ``blocks(skip + upsample(project(x)))``.

    Args:
        in_channels: of the coarser map.
        out_channels: of this level's map.
        blocks: the residual blocks of the level.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        # Projected before it is enlarged: the same result, at a quarter of the multiply-adds.
        self.project = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """The coarser map ``[B, C_in, h, w]`` and the way down's map ``[B, C_out, H, W]`` to a map of that shape."""
        return self.blocks(skip + resize(self.project(x), skip))


class PCEUNet(SavableModel):
    """A U-shaped network whose stages are routed by PCE layers on the way down and on the way up.

    Args:
        in_chans: channels of the image.
        num_classes: classes of a pixel.
        strides: pixels of the image per pixel of each stage's map; the first one is the stem's.
        depths: blocks per stage, on the way down and again on the way up; the deepest stage is passed once.
        widths: channels per stage.
        patch_sizes: patch side per stage in pixels of its map, None for a dense stage; see `make_stages` for the rule.
        position_maps: per stage, the side of the learned map that each block adds to what its body reads, in pixels;
            None for a stage, or for all: no map.
        drop_rate: dropout of whole channels before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dropout: inside the blocks, between their convolutions.
        layer_options: further arguments of every `PCELayer`: ``num_experts``, ``top_k``, ``border``, ``gate`` ...
            And ``expert_width``, channels inside an expert by those of its stage, 1 by default; ``top_k=2`` with 0.5
            costs as much as ``top_k=1``.

    Raises:
        TypeError: for an option that `PCELayer` does not have.
        ValueError: where stages or options break their rules.
    """

    task = "segment"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 11,
        *,
        strides: Sequence[int] = (2, 4, 8),
        depths: Sequence[int] = (1, 1, 1),
        widths: Sequence[int] = (24, 48, 96),
        patch_sizes: Sequence[int | None] = (32, 8, 4),
        position_maps: Sequence[int | None] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        stages = make_stages(strides, depths, widths, patch_sizes, position_maps)
        options = resolve_layer_options(self, layer_options, stages)
        self.model_args = {
            "in_chans": in_chans,
            "strides": list(strides),
            "depths": list(depths),
            "widths": list(widths),
            "patch_sizes": list(patch_sizes),
            **({} if position_maps is None else {"position_maps": list(position_maps)}),
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "dropout": dropout,
            **options,
        }
        self.num_classes = check_pixel_classes(num_classes)
        down, up = sum(depths), sum(depths[:-1])
        rates = iter(calculate_drop_path_rates(drop_path_rate, down + up))
        self.stem = make_stem(in_chans, stages[0])
        self.stages = nn.ModuleList()
        for before, stage in zip([stages[0], *stages], stages, strict=False):
            blocks_of = partial(make_blocks, dropout=dropout, options=options)
            self.stages.append(
                nn.Sequential(
                    *make_downsampling(before, stage), *blocks_of(stage, [next(rates) for _ in range(stage.depth)])
                )
            )
        self.levels = nn.ModuleList()
        for below, stage in zip(stages[:0:-1], stages[-2::-1], strict=True):
            blocks = blocks_of(stage, [next(rates) for _ in range(stage.depth)])
            self.levels.append(UpLevel(below.width, stage.width, blocks))
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.GELU())
        self.head = nn.Sequential(nn.Dropout2d(drop_rate), nn.Conv2d(widths[0], num_classes, 1))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The stacked normalisations, see ``stacked_norm_names``, and learned positions."""
        return stacked_norm_names(self) | position_map_names(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to the finest level's normalised features ``[B, widths[0], H/s, W/s]``, s its stride,
        rounded upwards."""
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        for level, skip in zip(self.levels, skips[-2::-1], strict=True):
            x = level(x, skip)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of any size to the logits of their pixels ``[B, num_classes, H, W]``."""
        return resize(self.head(self.forward_features(x)), x)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """A map bilinearly enlarged to the height and width of another."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


_NANO: dict[str, Any] = {"strides": (2, 4, 8), "depths": (1, 1, 1), "widths": (24, 48, 96), "patch_sizes": (32, 8, 4)}
# As many parameters in all as `pce_unet_nano`, at 3.9 times its twin's multiply-adds.
_NANO_WIDE: dict[str, Any] = {**_NANO, "widths": (48, 96, 184)}
_TINY: dict[str, Any] = {
    "strides": (2, 4, 8, 16),
    "depths": (1, 1, 2, 2),
    "widths": (32, 64, 128, 256),
    "patch_sizes": (32, 16, 4, 2),
}


# As in the twin, both convolutions see neighbouring pixels, which pays (docs/trials.md). And a batch of a
# few large images has few patches in its first stages, whose loads vary more from batch to batch.
_ROUTED = {"border": "exchange", "capacity_factor": 2.0}


_ARGUMENTS = {
    "pce_unet_nano": {**_NANO, **_ROUTED},
    "pce_unet_tiny": {**_TINY, **_ROUTED},
    "dense_unet_nano": dense(_NANO),
    # A cell of the map is 12 x 16 px of an image of 192 x 256.
    "dense_unet_nano_position": {**dense(_NANO), "position_maps": (16, 16, 16)},
    "dense_unet_nano_wide": dense(_NANO_WIDE),
    "dense_unet_tiny": dense(_TINY),
}


def segmentation_cfg(name: str, overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """timm's record of a segmentation network: its name and the preprocessing of its images."""
    record: dict[str, Any] = {
        "architecture": name,
        "input_size": INPUT_SIZE,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    return record | dict(overlay or {})


def _create(
    name: str, pretrained: bool = False, pretrained_cfg_overlay: Mapping[str, Any] | None = None, **given: Any
) -> PCEUNet:
    arguments, record = {**_ARGUMENTS[name], **given}, {}
    if pretrained:
        record = record_of(*next(iter(weights_of(name).items()))) | {"first_conv": "stem.0.0", "classifier": "head.1"}
        arguments = {"num_classes": record["num_classes"], **arguments}
    model = PCEUNet(**arguments)
    model.pretrained_cfg = segmentation_cfg(name, {**record, **(pretrained_cfg_overlay or {})})
    if pretrained:
        # timm's own rules on another number of classes and of channels.
        load_pretrained(model, record, num_classes=model.num_classes, in_chans=model.model_args["in_chans"])
        model.class_names = class_names_of(record, model.num_classes)
        if model.class_names is not None:
            model.mask_values, model.ignored_values = record.get("mask_values"), record.get("ignored_values")
    return model


UNETS: dict[str, Callable[..., PCEUNet]] = {name: partial(_create, name) for name in _ARGUMENTS}
"""The networks by name; a call takes ``pretrained``, which needs bundled weights (of several the first by name, such as
``camvid``; `pcenet.load_model` takes any), the arguments of `PCEUNet`, and ``pretrained_cfg_overlay``, as timm's do."""
