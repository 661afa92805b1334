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
    """

    stride: int
    depth: int
    width: int
    patch_size: int | None


def dense(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network's dense twin: no stage is routed."""
    return {**arguments, "patch_sizes": (None,) * len(arguments["strides"])}


def make_stages(
    strides: Sequence[int], depths: Sequence[int], widths: Sequence[int], patch_sizes: Sequence[int | None]
) -> list[Stage]:
    """Put stages together and check them.

    Strides multiply by a whole number from stage to stage; the first is a power of two. From routed stage to routed
    stage the patch side in map pixels shrinks strictly, and what a patch covers of the image, ``patch_size * stride``,
    never grows.

    Raises:
        ValueError: where a rule is broken, with the numbers.
    """
    lengths = {"strides": len(strides), "depths": len(depths), "widths": len(widths), "patch_sizes": len(patch_sizes)}
    if not strides or len(set(lengths.values())) > 1:
        raise ValueError(f"strides, depths, widths and patch_sizes must have one entry per stage, not {lengths}")
    stages = [Stage(*fields) for fields in zip(strides, depths, widths, patch_sizes, strict=True)]
    for name in ("stride", "depth", "width", "patch_size"):
        for index, stage in enumerate(stages):
            value = getattr(stage, name)
            dense = name == "patch_size" and value is None
            if not dense and (not is_whole(value) or value < 1):
                raise ValueError(f"{name} of stage {index} is {value!r}; it must be a whole number and at least 1")
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
