"""What else is at work on a forward pass: function transforms, tracers."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active: it sees plain operators alone, and
    what is made within it may not outlive it. (A compiler knows transforms itself.)"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_follows(buffer: Tensor, value: Tensor, name: str, way_out: str) -> None:
    """Raise a ``ValueError`` where a buffer would have to follow a value that exists within a transform of `torch.func`
    only: one for each of the batches that ``vmap`` makes of one, or one that ``grad`` or ``jvp`` keeps track of.

    Args:
        buffer: what would be written to.
        value: what would be written.
        name: of the buffer, for the message.
        way_out: what to do instead.
    """
    if not transforming():
        return
    inside = torch._C._functorch.is_functorch_wrapped_tensor
    if inside(value) and not inside(buffer):
        raise ValueError(f"{name} cannot follow batches within a transform of torch.func: {way_out}")


def check_not_traced(x: object) -> None:
    """Raise a ``ValueError`` for a pass that is recorded by `torch.jit.trace` or `torch.fx`: they would keep the sizes,
    or the routing, of the one input that they see."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace would keep the sizes of one input for all others: write the network to a file by "
            "'pcenet export', or take torch.export.export with dispatch='static'"
        )
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "torch.fx cannot look into PCE layers, whose routing depends on the data: trace with PCELayer and "
            "PCEConv2d as leaf modules, or take torch.export.export with dispatch='static'"
        )
