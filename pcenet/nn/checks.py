"""Checks of arguments, of modules and of what else is at work on a pass; a ValueError names what breaks which rule."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pcenet.ops.compiled import transforming


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """The value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_at_least(least: int, **arguments: int) -> None:
    """Every argument, given by its name, is a whole number and at least ``least``."""
    for name, value in arguments.items():
        if not is_whole(value) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number and at least {least}")


def is_whole(value: object) -> bool:
    """Whether the value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether the value is a number that can be compared with others."""
    return isinstance(value, Real)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says and nothing else: no subclass, no hooks, no other forward."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return torch.compiler.is_compiling() or not _has_any_global_hook()


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
            "'pcenet export', one of your own by pcenet.exporting.onnx_writing.export_onnx, or take torch.export.export"
        )
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "torch.fx cannot look into PCE layers, whose routing depends on the data: trace with PCELayer and "
            "PCEConv2d as leaf modules, or take torch.export.export"
        )
