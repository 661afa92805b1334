"""Stages as data, and the design's rule on depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pcenet.nn.checks import is_whole


class Stage(NamedTuple):
    """One stage of a network.

    Attributes:
        stride: pixels of the image per pixel of the stage's map.
        depth: blocks.
        width: channels.
        patch_size: patch side in pixels of the map; None for a dense stage.
        position_map: the side of the learned map that each block adds to what its body reads; None: no map.
        mixed_kernels: of a dense stage, the number of kernels that each convolution mixes for each image; None: one.
    """

    stride: int
    depth: int
    width: int
    patch_size: int | None
    position_map: int | None = None
    mixed_kernels: int | None = None


def dense(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network's dense twin: no stage is routed."""
    return {**arguments, "patch_sizes": (None,) * len(arguments["strides"])}


def make_stages(
    strides: Sequence[int],
    depths: Sequence[int],
    widths: Sequence[int],
    patch_sizes: Sequence[int | None],
    position_maps: Sequence[int | None] | None = None,
    mixed_kernels: Sequence[int | None] | None = None,
) -> list[Stage]:
    """Put stages together and check them.

    Strides multiply by a whole number from stage to stage; the first is a power of two. From routed stage to routed
    stage the patch side in map pixels shrinks strictly, and what a patch covers of the image, ``patch_size * stride``,
    never grows. ``position_maps``, and ``mixed_kernels`` of dense stages alone, are None for none at all.

    Raises:
        ValueError: where a rule is broken, with the numbers.
    """
    given = {"strides": strides, "depths": depths, "widths": widths, "patch_sizes": patch_sizes}
    given |= {"position_maps": position_maps} if position_maps is not None else {}
    given |= {"mixed_kernels": mixed_kernels} if mixed_kernels is not None else {}
    lengths = {name: len(values) for name, values in given.items()}
    if not strides or len(set(lengths.values())) > 1:
        raise ValueError(f"strides, depths, widths and patch_sizes must have one entry per stage, not {lengths}")
    none = (None,) * len(strides)
    columns = (strides, depths, widths, patch_sizes, position_maps or none, mixed_kernels or none)
    stages = [Stage(*fields) for fields in zip(*columns, strict=True)]
    for index, stage in enumerate(stages):
        for name, value in stage._asdict().items():
            optional = name in ("patch_size", "position_map", "mixed_kernels") and value is None
            if not optional and (not is_whole(value) or value < 1):
                raise ValueError(f"{name} of stage {index} is {value!r}; it must be a whole number and at least 1")
        if stage.patch_size is not None and stage.mixed_kernels is not None:
            raise ValueError(f"mixed_kernels of stage {index} has no effect on a routed stage; it is for dense ones")
    if strides[0] & (strides[0] - 1):
        raise ValueError(f"strides[0]={strides[0]} must be a power of two: the stem halves the image step by step")
    for before, after in pairwise(strides):
        if after % before:
            raise ValueError(f"strides={tuple(strides)}: {after} is not a multiple of {before}")
    routed = [(stage.patch_size, stage.stride) for stage in stages if stage.patch_size is not None]
    for (patch_above, stride_above), (patch_below, stride_below) in pairwise(routed):
        if patch_below >= patch_above:
            raise ValueError(
                f"patch_sizes={tuple(patch_sizes)}: the patch must shrink strictly from routed stage to routed stage, "
                f"but {patch_below} follows {patch_above}"
            )
        covered_above, covered_below = patch_above * stride_above, patch_below * stride_below
        if covered_below > covered_above:
            raise ValueError(
                f"patch_sizes={tuple(patch_sizes)} at strides={tuple(strides)}: a patch must not cover more of the "
                f"image with depth, but {covered_below} px (patch {patch_below}, stride {stride_below}) follow "
                f"{covered_above} px; take a patch of {covered_above // stride_below} at most"
            )
    return stages
