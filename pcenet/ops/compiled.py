"""Kernels, called with tensors as they take them, and their gradients.

All compute on pixels ``[B, H, W, C]``. Where the compiled library takes float32 alone, what is of another type is
converted here. Axes as in `pcenet.ops.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pcenet.ops import library, reference
from pcenet.ops.reference import Affine

OPS = torch.ops.pcenet


def runs(operator: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels compute an operator on these tensors, those of them that there are."""
    return library.takes(operator, x, *others) and not transforming()


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active: it sees plain operators alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a tracer, a transform or a dispatch mode looks on: what it sees must not depend on numbers, and what it
    makes ends with it."""
    return torch.compiler.is_compiling() or transforming() or _get_current_dispatch_mode() is not None


def tracked(*inputs: Any) -> bool:
    """Whether autograd will ask for a gradient of what is made of these, tensors among them."""
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)


def autocast_enabled(x: Tensor) -> bool:
    """Whether operators on the device of a tensor are to run in another type."""
    device = x.device.type
    return _can_autocast(device) and torch.is_autocast_enabled(device)


@library.constant_for_dynamo  # torch 2.10's cannot trace the question
def _can_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operators on the device of a tensor run in the type of what they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def autocast(x: Tensor) -> Tensor:
    """A map in the type in which its convolution is to run."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype != torch.float64 and autocast_enabled(x) else x


def _pixels(x: Tensor, *others: Tensor) -> list[Tensor]:
    """A map, and others that belong to it, as kernels take them: views, where maps are channels-last and of a type in
    which kernels compute.

    Kernels on the processor take float32. Those that multiply bfloat16 do so in pairs: they also take x in bfloat16,
    with an even number of channels, and the other maps then in bfloat16 or float32.
    """
    maps = [each.permute(0, 2, 3, 1) for each in (x, *others)]
    if library.kernels_on(x.device.type) != "triton":
        kept = x.dtype == torch.bfloat16 and x.shape[1] % 2 == 0 and library.takes_bfloat16()
        maps = [each if kept else each.float() for each in maps]
    return [each.contiguous() for each in maps]


def _map(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return pixels.permute(0, 3, 1, 2).to(dtype)


def _kernel(weight: Tensor | None) -> Tensor | None:
    """A weight as kernels take it, with taps in equal steps, in whatever layout."""
    if weight is None:
        return None
    rows, columns = weight.stride()[-2:]
    evenly = weight.shape[-1] == 1 or rows == weight.shape[-1] * columns
    return (weight if evenly else weight.contiguous()).float()


def _floats(x: Tensor | None) -> Tensor | None:
    # Nearly all of a layer's two dozen tensors are ready, and for a single image calls count.
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def _parts(x: Tensor, affine: Affine | None) -> tuple[Tensor, tuple[Any, ...], torch.dtype]:
    """A map and what follows as kernels take it, and the type of what that makes of x."""
    scale, shift, gelu, gate, residual = affine or Affine()
    dtype = x.dtype
    if residual is None:
        (pixels,) = _pixels(x)
    else:
        if residual.dtype != dtype:  # for a single image calls count
            dtype = torch.promote_types(dtype, residual.dtype)
        pixels, residual = _pixels(x, residual)
    return pixels, (_floats(scale), _floats(shift), gelu, _floats(gate), residual), dtype


def patch_conv2d(
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    expert: Tensor,
    patch_size: int,
    neighbours: bool,
    then: Affine | None = None,
) -> Tensor:
    """See `pcenet.ops.patch_conv2d`; without gradients, as all of these."""
    pixels, parts, dtype = _parts(x, then)
    kernels = (_kernel(weight), _kernel(base))
    return _map(OPS.patch_conv2d(pixels, *kernels, expert, patch_size, neighbours, *parts), dtype)


def patch_affine(x: Tensor, expert: Tensor, patch_size: int, *affine: Any) -> Tensor:
    """See `pcenet.ops.patch_affine`."""
    pixels, parts, dtype = _parts(x, Affine(*affine))
    return _map(OPS.patch_affine(pixels, expert, patch_size, *parts), dtype)


def expert_block(
    x: Tensor, expert: Tensor, patch_size: int, first: Any, second: Any, gate: Any, residual: Any
) -> Tensor:
    """See `pcenet.ops.expert_block`."""
    convolutions = [
        (_kernel(part.weight), _kernel(part.base), [_floats(each) for each in part.norm], part.eps, part.neighbours)
        for part in (first, second)
    ]
    pixels, (*_, gate, residual), dtype = _parts(x, Affine(gate=gate, residual=residual))
    if first.weight.shape[1] % 2 and pixels.dtype == torch.bfloat16:  # what is between cannot be multiplied in pairs
        pixels, residual = pixels.float(), None if residual is None else residual.float()
    out = OPS.expert_block(pixels, expert, patch_size, *convolutions[0], *convolutions[1], gate, residual)
    return _map(out, dtype)


def expert_moments(x: Tensor, expert: Tensor, patch_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `pcenet.ops.expert_moments`."""
    return OPS.expert_moments(*_pixels(x.detach()), expert, patch_size, num_experts)


def patch_logits(x: Tensor, hidden: Any, patch_size: int, weight: Tensor, bias: Tensor, *balance: Any) -> Tensor:
    """See `pcenet.ops.patch_logits`."""
    first = [_floats(each) for each in hidden]
    return OPS.patch_logits(*_pixels(x), *first, patch_size, _floats(weight), bias, *map(_floats, balance))


class Operator(NamedTuple):
    """What `apply` needs of an operator; all take the same inputs.

    Attributes:
        compute: calls kernels.
        reference: the same in plain torch, for derivatives of gradients.
        gradients: ``gradients(needed, grad, *inputs)``, by kernels, for as many of the inputs as may need one.
    """

    compute: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]]


def apply(operator: Operator, *inputs: Any) -> Tensor:
    """An operator that has kernels, differentiable."""
    return _Differentiable.apply(operator, *inputs) if tracked(*inputs) else operator.compute(*inputs)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*[each if isinstance(each, Tensor) else None for each in inputs])
        ctx.operator, ctx.others = operator, [None if isinstance(each, Tensor) else each for each in inputs]
        # Not a view, though channels come last in memory: what FSDP and tensors changed in place cannot deal with.
        return operator.compute(*inputs).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, *_differentiable_gradients(ctx.operator.reference, needed, grad, inputs)
        found = ctx.operator.gradients(needed, grad, *inputs)
        # Each in the type of what it is of.
        typed = [
            value.to(each.dtype) if value is not None and asked else None
            for value, each, asked in zip(found, inputs, needed, strict=False)
        ]
        return None, *typed, *[None] * (len(inputs) - len(found))


def _differentiable_gradients(
    reference: Callable[..., Tensor], needed: tuple[bool, ...], grad: Tensor, inputs: list[Any]
) -> list[Tensor | None]:
    with torch.enable_grad():
        # Views, so that an input that came in twice has two gradients.
        own = [each.view_as(each) if asked else each for each, asked in zip(inputs, needed, strict=True)]
        asked_for = [each for each, asked in zip(own, needed, strict=True) if asked]
        found = iter(torch.autograd.grad(reference(*own), asked_for, grad, create_graph=True, allow_unused=True))
    return [next(found) if asked else None for asked in needed]


def _convolution_gradients(
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    *places: Any,
) -> tuple[Tensor | None, ...]:
    grad_x = of_experts = of_base = None
    if needed[0]:
        grad_x = _map(OPS.patch_conv2d_input_grad(*_pixels(grad), _kernel(weight), _kernel(base), *places), x.dtype)
    if needed[1] or needed[2]:
        pixels, grads = _pixels(x, grad)
        taps_last = OPS.patch_conv2d_weight_grad(grads, pixels, *places, weight.shape[0], weight.shape[3])
        # Summed before axes are permuted: afterwards the sum of sixteen kernels takes eight times as long.
        of_base = taps_last.sum(0).permute(0, 3, 1, 2) if needed[2] else None
        of_experts = taps_last.permute(0, 1, 4, 2, 3)
    return grad_x, of_experts, of_base


def _affine_gradients(
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    expert: Tensor,
    patch_size: int,
    scale: Tensor | None,
    shift: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor | None, ...]:
    pixels, grads = _pixels(x, grad)
    affine = (_floats(scale), _floats(shift), gelu, _floats(gate))
    grad_x = of_scale = of_shift = of_gate = None
    if needed[3] or needed[4] or needed[6]:
        table = shift if scale is None else scale
        own, experts = (expert.clamp(max=0), 1) if table is None else (expert, len(table))
        of_shift, of_scale, of_gate = OPS.patch_affine_sums(grads, pixels, own, patch_size, experts, *affine, None)
    if needed[0]:
        grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, expert, patch_size, *affine, None, None), x.dtype)
    return grad_x, None, None, of_scale, of_shift, None, of_gate, grad


def _reference_norm(*inputs: Any) -> Tensor:
    *given, _rstd, _mean, _share = inputs
    return reference.expert_norm(*given)[0]


def _compute_norm(*inputs: Any) -> Tensor:
    x, weight, bias, expert, patch_size, gelu, gate, residual, *_, rstd, mean, _share = inputs
    scale = weight * rstd
    return patch_affine(x, expert, patch_size, scale, bias - mean * scale, gelu, gate, residual)


def _norm_gradients(needed: tuple[bool, ...], grad: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, expert, patch_size, gelu, gate, _residual, *_, total, rstd, mean, share = inputs
    pixels, grads = _pixels(x, grad)
    scale = weight * rstd
    affine = (_floats(scale), _floats(bias - mean * scale), gelu, _floats(gate))
    # Of g, the gradient before the affine map, the sum over each expert's pixels, and that of g * (x - mean).
    plain, centred, of_gate = OPS.patch_affine_sums(grads, pixels, expert, patch_size, len(weight), *affine, mean)
    grad_x = None
    if needed[0]:
        of_all = (plain, centred) if total is None else (total(plain), total(centred))
        slope = -scale * rstd.square() * of_all[1] * share
        offset = -scale * of_all[0] * share - slope * mean
        parts = (*affine, _floats(slope), _floats(offset))
        grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, expert, patch_size, *parts), x.dtype)
    return grad_x, centred * rstd, plain, None, None, None, of_gate, grad


def _compute_perceptron(x: Tensor, *layer: Any) -> Tensor:
    *tensors, patch_size = layer
    return OPS.patch_perceptron(*_pixels(x), *map(_floats, tensors), patch_size)


def _perceptron_gradients(needed: tuple[bool, ...], grad: Tensor, x: Tensor, *layer: Any) -> tuple[Tensor | None, ...]:
    *tensors, patch_size = layer
    weight, _, rows, columns = tensors
    inputs = (_floats(grad), *_pixels(x), *map(_floats, tensors), patch_size, needed[0])
    grad_x, of_content, of_rows, of_columns = OPS.patch_perceptron_backward(*inputs)
    of_weight = torch.cat((of_content, of_rows.T @ rows + of_columns.T @ columns), dim=1)
    of_place = weight[:, x.shape[1] :]
    of_lines = [lines @ of_place if needed[i] else None for i, lines in ((3, of_rows), (4, of_columns))]
    return _map(grad_x, x.dtype) if needed[0] else None, of_weight, of_rows.sum(0), *of_lines


CONVOLUTION = Operator(patch_conv2d, reference.patch_conv2d, _convolution_gradients)
AFFINE = Operator(patch_affine, reference.patch_affine, _affine_gradients)
NORM = Operator(_compute_norm, _reference_norm, _norm_gradients)
PERCEPTRON = Operator(_compute_perceptron, reference.patch_perceptron, _perceptron_gradients)
