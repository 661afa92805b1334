"""Running experts on their patches. These files alone handle indices: dispatch, `pcenet.nn.windows`, and one for each
implementation, `pcenet.nn.sorted_dispatch` and `pcenet.nn.static_dispatch`.

Axes: B images of H x W, N patches, k experts per patch, T slots (one per kept pair of patch and expert, in the order
in which the experts take them, perhaps with padding between), E experts, C channels, S patch side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from pcenet.nn.experts import ConvExperts, takes_turns
from pcenet.nn.kernels import Kernel, make_kernel, make_plain_kernel
from pcenet.nn.patches import check_grid
from pcenet.nn.routing import Routing
from pcenet.nn.sorted_dispatch import convolve_sorted, run_sorted
from pcenet.nn.static_dispatch import convolve_static, run_static
from pcenet.nn.transforms import transforming

Border = Literal["zero", "halo", "exchange"]
Dispatch = Literal["sorted", "static"]
AnyKernel = TypeVar("AnyKernel", bound=Kernel)


def run_experts(
    x: Tensor, routing: Routing, experts: ConvExperts, *, patch_size: int, border: Border, dispatch: Dispatch
) -> Tensor:
    """Each patch through its experts, weighted, summed over them and put back in place.

    Args:
        x: the map ``[B, C, H, W]`` that was routed.
        routing: who goes where.
        experts: the experts' weights.
        patch_size: S.
        border: what a convolution sees beyond its patch's edge (design, section 2).
        dispatch: ``"sorted"`` (no padding; one synchronisation with the host) or ``"static"`` (no shape that depends on
            the routing). Equal in outputs and gradients; gradients of gradients need ``"static"``. What cannot be
            sorted takes the static way by itself: the meta device, transforms of `torch.func`, experts that
            `takes_turns` says no to.

    Returns:
        The map ``[B, C_out, H, W]``, channels-last in memory, zero where a patch was dropped.

    Raises:
        ValueError: for a routing of another map's grid; for one with ``top_k`` above 1 under ``"exchange"``.
    """
    run = _run_static if _is_static(x, dispatch) else _run_sorted
    return run(x, routing, experts, patch_size, border)


def run_convolution(
    x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None, *, patch_size: int, dispatch: Dispatch
) -> Tensor:
    """Each patch through its experts' single convolutions, which read the neighbours' pixels, weighted, summed over the
    experts and put back in place.

    Args:
        x: the map ``[B, C, H, W]`` that is convolved.
        routing: who goes where.
        weight: ``[E, C_out, C, k, k]`` with k = 3 or 1.
        bias: ``[E, C_out]``.
        patch_size: S.
        dispatch: as in `run_experts`.

    Returns:
        As there.

    Raises:
        ValueError: as there.
    """
    run = _convolve_static if _is_static(x, dispatch) else _convolve_sorted
    return run(x, routing, weight, bias, patch_size)


def check_border(border: Border, top_k: int) -> None:
    """Raise a ``ValueError`` for a border that does not go with several experts per patch."""
    if border == "exchange" and top_k > 1:
        raise ValueError(
            f"top_k={top_k} does not go with border='exchange': a pixel's activation would belong to several "
            "experts; take top_k=1, or border='halo'"
        )


def _is_static(x: Tensor, dispatch: Dispatch) -> bool:
    # On the meta device there are no counts to sort by, only shapes. (`x.is_meta` is an operator to torch.compile, and
    # would be a graph of its own in every layer.)
    return dispatch == "static" or x.device.type == "meta" or transforming()


def _run_static(x: Tensor, routing: Routing, experts: ConvExperts, patch_size: int, border: Border) -> Tensor:
    check_border(border, routing.top_k)
    check_grid(x, patch_size, routing.grid)
    first, second = _make_kernels(make_plain_kernel, experts, patch_size, border)
    return run_static(_autocast(x), routing, experts, first, second)


# Batches whose sizes change from step to step would be compiled again in each. Checks, casts and kernels are in here,
# too: compiled, they would be a graph of their own for every layer.
@torch.compiler.disable
def _run_sorted(x: Tensor, routing: Routing, experts: ConvExperts, patch_size: int, border: Border) -> Tensor:
    if not takes_turns(experts):
        return _run_static(x, routing, experts, patch_size, border)
    check_border(border, routing.top_k)
    check_grid(x, patch_size, routing.grid)
    first, second = _make_kernels(make_kernel, experts, patch_size, border)
    return run_sorted(_autocast(x), routing, experts, first, second)


def _convolve_static(x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None, patch_size: int) -> Tensor:
    check_grid(x, patch_size, routing.grid)
    kernel = make_plain_kernel(_autocast(weight), patch_size, weight.shape[-1] // 2)
    return convolve_static(_autocast(x), routing, kernel, bias)


@torch.compiler.disable
def _convolve_sorted(x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None, patch_size: int) -> Tensor:
    check_grid(x, patch_size, routing.grid)
    kernel = make_kernel(_autocast(weight), patch_size, weight.shape[-1] // 2)
    return convolve_sorted(_autocast(x), routing, kernel, bias)


def _make_kernels(
    make: Callable[[Tensor, int, int], AnyKernel], experts: ConvExperts, patch_size: int, border: Border
) -> tuple[AnyKernel, AnyKernel]:
    """Both convolutions of the experts, each with the margin that the border gives it."""
    first = make(_autocast(experts.conv1()), patch_size, int(border != "zero"))
    return first, make(_autocast(experts.conv2()), patch_size, int(border == "exchange"))


def _autocast(x: Tensor) -> Tensor:
    """Cast once, before the gather, which then moves half the bytes; inside it, autocast would cast every batch."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
