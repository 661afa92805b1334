"""Running experts on their patches. These files alone handle indices: dispatch, `pcenet.nn.windows`, and one for each
implementation, `pcenet.nn.sorted_dispatch` and `pcenet.nn.static_dispatch`.

Axes: B images of H x W, N patches, k experts per patch, T slots (one per kept pair of patch and expert, in the order
in which the experts take them, perhaps with padding between), E experts, C channels, S patch side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pcenet.nn.experts import ConvExperts
from pcenet.nn.kernels import make_kernel, make_plain_kernel
from pcenet.nn.routing import Routing
from pcenet.nn.sorted_dispatch import run_sorted
from pcenet.nn.static_dispatch import run_static

Border = Literal["zero", "halo", "exchange"]
Dispatch = Literal["sorted", "static"]

# Batches whose sizes change from step to step would be compiled again in each.
_run_sorted = torch.compiler.disable(run_sorted)


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
            the routing). Equal in outputs and gradients; gradients of gradients need ``"static"``.

    Returns:
        The map ``[B, C_out, H, W]``, channels-last in memory, zero where a patch was dropped.
    """
    x, weight1, weight2 = _autocast(x), _autocast(experts.conv1.weight), _autocast(experts.conv2.weight)
    margin1, margin2 = int(border != "zero"), int(border == "exchange")
    # On the meta device there are no counts to sort by, only shapes.
    if dispatch == "static" or x.is_meta:
        first = make_plain_kernel(weight1, patch_size, margin1)
        return run_static(x, routing, experts, first, make_plain_kernel(weight2, patch_size, margin2))
    return _run_sorted(
        x, routing, experts, make_kernel(weight1, patch_size, margin1), make_kernel(weight2, patch_size, margin2)
    )


def _autocast(x: Tensor) -> Tensor:
    """Cast once, before the gather, which then moves half the bytes; inside it, autocast would cast every batch."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
