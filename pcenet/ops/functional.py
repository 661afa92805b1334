"""What the operators mean, and which backend computes them.

A map ``[B, C, H, W]`` is cut into patches of S x S pixels, numbered row by row within an image, image by image; the
last row and column of patches may stick out of the map. ``expert`` ``[N]`` says whose each patch is, -1 for nobody's.
Every operator takes and gives maps, whose shapes do not depend on who is whose; sorting patches by expert is a private
matter of a backend.

Axes: B images, C channels in, D channels out, H x W the map, N patches, E experts, S patch side, K kernel side. With k
experts per patch there are k*B images, one map for each choice: ``x.repeat(k, 1, 1, 1)`` and experts ``[k * N]``.

Where the compiled library runs (`pcenet.ops.backend`), these are its operators with gradients of their own; everything
else, second derivatives and transforms of `torch.func` among it, takes `pcenet.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from pcenet.ops import library, reference

OPS = torch.ops.pcenet


def patch_conv2d(x: Tensor, weight: Tensor, expert: Tensor, patch_size: int, neighbours: bool = True) -> Tensor:
    """Convolve every pixel with the kernel of its patch's expert.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[E, D, C, K, K]``, K = 1 or 3; under autocast both are cast, as for a convolution.
        expert: ``[N]`` int64.
        patch_size: S.
        neighbours: whether taps beyond a patch read the pixels there, or zero. Beyond the map they read zero.

    Returns:
        ``[B, D, H, W]``, channels-last; zero where a patch is nobody's.
    """
    x, weight = _autocast(x), _autocast(weight)
    if not _compiled(x, weight):
        return reference.patch_conv2d(x, weight, expert, patch_size, neighbours)
    out: Tensor = _PatchConv2d.apply(x, weight, expert, patch_size, neighbours)
    return out


def patch_conv2d_affine(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    patch_size: int,
    neighbours: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`patch_conv2d` and then `patch_affine`; in one pass over the map where nothing needs a gradient."""
    if (lowered := library.lowered()) is not None:
        return lowered(x, weight, expert, patch_size, neighbours, scale, shift, gelu=gelu, gate=gate, residual=residual)
    x, weight = _autocast(x), _autocast(weight)
    if not _compiled(x, weight) or _tracked(x, weight, scale, shift, gate, residual):
        out = patch_conv2d(x, weight, expert, patch_size, neighbours)
        return patch_affine(out, scale, shift, expert, patch_size, gelu=gelu, gate=gate, residual=residual)
    added = None if residual is None else _pixels(residual)
    parameters = (_floats(scale), _floats(shift), gelu, _floats(gate), added)
    return _map(OPS.patch_conv2d(_pixels(x), _kernel(weight), expert, patch_size, neighbours, *parameters))


def patch_affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    expert: Tensor,
    patch_size: int,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Scale and shift each patch by what its expert has, channel by channel: ``residual + gate * act(x * scale +
    shift)``.

    Args:
        x: ``[B, C, H, W]``.
        scale: ``[E, C]``; None: 1.
        shift: ``[E, C]``; None: 0.
        expert: ``[N]`` int64; of a patch of nobody's all that is added to the residual is zero.
        patch_size: S.
        gelu: whether act is GELU, or the identity.
        gate: ``[N]``; None: 1.
        residual: ``[B, C, H, W]``; None: 0.
    """
    if not _compiled(x):
        return reference.patch_affine(x, scale, shift, expert, patch_size, gelu, gate, residual)
    out: Tensor = _PatchAffine.apply(x, scale, shift, expert, patch_size, gelu, gate, residual)
    return out


def expert_moments(x: Tensor, expert: Tensor, patch_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each expert's pixels on the map their number ``[E]``, and by channel mean and biased variance ``[E, C]``, in
    float32 at least; zeros for an expert without any.

    Differentiable where the reference runs; `expert_norm` needs no gradient of it elsewhere.
    """
    if not _compiled(x):
        return reference.expert_moments(x, expert, patch_size, num_experts)
    moments: tuple[Tensor, Tensor, Tensor] = OPS.expert_moments(_pixels(x.detach()), expert, patch_size, num_experts)
    return moments


class Normed(NamedTuple):
    """What `expert_norm` returns: the map, and number, mean and biased variance of each expert's pixels."""

    out: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor


def expert_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert: Tensor,
    patch_size: int,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Normed:
    """Batch normalisation by the statistics of each expert's own pixels, then what `patch_affine` does.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[E, C]``.
        bias: ``[E, C]``.
        expert: ``[N]`` int64.
        patch_size: S.
        running_mean: ``[E, C]``, for experts with fewer than 2 pixels, whose statistics say nothing.
        running_var: ``[E, C]``, likewise.
        eps: added to variances.
        gelu: as in `patch_affine`; so are the next two.
        gate: ``[N]``.
        residual: ``[B, C, H, W]``.
        total: sums a tensor over all processes that train together, where statistics are theirs; differentiable.
    """
    settings = (patch_size, gelu, eps, total)
    # Running statistics are copied: they change before a backward pass asks for them.
    inputs = (x, weight, bias, expert, gate, residual, running_mean.clone(), running_var.clone())
    if not _compiled(x) or weight.dtype == torch.float64:
        return _reference_norm(*inputs, *settings)
    return Normed(*_ExpertNorm.apply(*inputs, *settings))


def _reference_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    patch_size: int,
    gelu: bool,
    eps: float,
    total: Callable[[Tensor], Tensor] | None,
) -> Normed:
    moments = reference.expert_moments(x, expert, patch_size, len(weight))
    scale, mean, _, (count, *batch) = _standardising(moments, running_mean, running_var, eps, total)
    scale = scale * weight
    out = reference.patch_affine(x, scale, bias - mean * scale, expert, patch_size, gelu, gate, residual)
    return Normed(out, count, *(moment.detach() for moment in batch))


def _standardising(
    moments: tuple[Tensor, Tensor, Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    total: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The factor and the mean ``[E, C]`` that standardise each expert's pixels; what share ``[E, 1]`` a pixel has of
    these, 0 where they are running ones; and the moments of all processes."""
    if total is not None:
        moments = _total_moments(*moments, total)
    count, mean, variance = moments
    enough = (count >= 2)[:, None]
    mean = torch.where(enough, mean, running_mean.to(mean.dtype))
    variance = torch.where(enough, variance, running_var.to(variance.dtype))
    share = torch.where(enough, count.clamp(min=1).reciprocal()[:, None], 0.0)
    return torch.rsqrt(variance + eps), mean, share, moments


def _total_moments(
    count: Tensor, mean: Tensor, variance: Tensor, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the values of all processes: first the means, then squares around the common one."""
    own = torch.cat((count[:, None], mean * count[:, None]), dim=1)
    everybody = total(own)
    all_count, all_mean = everybody[:, 0], everybody[:, 1:] / everybody[:, :1].clamp(min=1)
    squares = total((variance + (mean - all_mean).square()) * count[:, None])
    return all_count, all_mean, squares / all_count.clamp(min=1)[:, None]


def patch_perceptron(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, patch_size: int) -> Tensor:
    """The first layer of a perceptron on every pixel, averaged over the real pixels of each patch: ``mean(gelu(weight x
    + rows + columns))``.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[D, C]``.
        rows: ``[H, D]``, what a pixel's row adds.
        columns: ``[W, D]``, what its column adds.
        patch_size: S.

    Returns:
        ``[N, D]``.
    """
    if not _compiled(x, weight) or x.dtype != torch.float32:
        return reference.patch_perceptron(x, weight, rows, columns, patch_size)
    out: Tensor = _PatchPerceptron.apply(x, weight, rows, columns, patch_size)
    return out


def _pixels(x: Tensor) -> Tensor:
    """A map as the compiled operators take it, ``[B, H, W, C]``: of one that is channels-last, a view."""
    return x.permute(0, 2, 3, 1).contiguous()


def _map(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def _kernel(weight: Tensor) -> Tensor:
    """A weight as the compiled operators take it, float32 with taps in equal steps, in whatever layout."""
    rows, columns = weight.stride()[3:]
    evenly = weight.shape[3] == 1 or rows == weight.shape[4] * columns
    return (weight if evenly else weight.contiguous()).float()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


def _compiled(*tensors: Tensor) -> bool:
    """Whether the compiled library computes an operator on these tensors."""
    return library.takes(*tensors) and not transforming()


def _tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of what is made of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active: it sees plain operators alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _again(function: Callable[..., Tensor], ctx: Any, grad: Tensor, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of the reference, themselves differentiable, for the inputs of a function that are tensors and need
    one."""
    needed = [index for index, need in enumerate(ctx.needs_input_grad) if need]
    with torch.enable_grad():
        # Views, so that an input that came in twice has two gradients.
        own = [value.view_as(value) if index in needed else value for index, value in enumerate(inputs)]
        found = torch.autograd.grad(
            function(*own), [own[index] for index in needed], grad, create_graph=True, allow_unused=True
        )
    grads: list[Tensor | None] = [None] * len(inputs)
    for index, value in zip(needed, found, strict=True):
        grads[index] = value
    return tuple(grads)


def _differentiable() -> bool:
    """Whether somebody wants gradients of the gradients that a backward pass computes."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _PatchConv2d(torch.autograd.Function):
    """`patch_conv2d` of the compiled library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, expert: Tensor, patch_size: int, neighbours: bool) -> Tensor:
        ctx.save_for_backward(x, weight, expert)
        ctx.patch_size, ctx.neighbours = patch_size, neighbours
        nothing = (None, None, False, None, None)
        return _map(OPS.patch_conv2d(_pixels(x), _kernel(weight), expert, patch_size, neighbours, *nothing))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, expert = ctx.saved_tensors
        if _differentiable():
            return _again(reference.patch_conv2d, ctx, grad, (x, weight, expert, ctx.patch_size, ctx.neighbours))
        grads, settings = _pixels(grad), (expert, ctx.patch_size, ctx.neighbours)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _map(OPS.patch_conv2d_input_grad(grads, _kernel(weight), *settings))
        if ctx.needs_input_grad[1]:
            taps_last = OPS.patch_conv2d_weight_grad(grads, _pixels(x), *settings, weight.shape[0], weight.shape[3])
            grad_weight = taps_last.permute(0, 1, 4, 2, 3).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


class _PatchAffine(torch.autograd.Function):
    """`patch_affine` of the compiled library."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        expert: Tensor,
        patch_size: int,
        gelu: bool,
        gate: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, expert, gate, residual)
        ctx.patch_size, ctx.gelu = patch_size, gelu
        added = None if residual is None else _pixels(residual)
        parameters = (_floats(scale), _floats(shift), expert, patch_size, gelu, _floats(gate), added)
        return _map(OPS.patch_affine(_pixels(x), *parameters))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, shift, expert, gate, residual = ctx.saved_tensors
        if _differentiable():
            inputs = (x, scale, shift, expert, ctx.patch_size, ctx.gelu, gate, residual)
            return _again(reference.patch_affine, ctx, grad, inputs)
        grads, pixels, of_gate = _pixels(grad), _pixels(x), _floats(gate)
        need_x, need_scale, need_shift, *_, need_gate, need_residual = ctx.needs_input_grad
        grad_x = grad_scale = grad_shift = grad_gate = None
        affine = (_floats(scale), _floats(shift))
        if need_scale or need_shift or need_gate:
            num_experts = len(scale) if scale is not None else len(shift) if shift is not None else 1
            own = expert if scale is not None or shift is not None else expert.clamp(max=0)
            grad_shift, grad_scale, grad_gate = OPS.patch_affine_sums(
                grads, pixels, *affine, own, ctx.patch_size, num_experts, ctx.gelu, of_gate, None
            )
        if need_x:
            settings = (expert, ctx.patch_size, ctx.gelu, of_gate, None, None)
            grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, *affine, *settings))
        return (
            grad_x,
            grad_scale.to(scale.dtype) if need_scale else None,
            grad_shift.to(shift.dtype) if need_shift else None,
            None,
            None,
            None,
            grad_gate.to(gate.dtype) if need_gate else None,
            grad if need_residual else None,
        )


class _ExpertNorm(torch.autograd.Function):
    """`expert_norm` of the compiled library; its statistics are functions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        expert: Tensor,
        gate: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        patch_size: int,
        gelu: bool,
        eps: float,
        total: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        pixels = _pixels(x)
        moments = OPS.expert_moments(pixels, expert, patch_size, len(weight))
        rstd, mean, share, moments = _standardising(moments, running_mean, running_var, eps, total)
        ctx.save_for_backward(x, weight, bias, expert, gate, residual, running_mean, running_var, rstd, mean, share)
        ctx.settings = (patch_size, gelu, eps, total)
        scale = weight * rstd
        added = None if residual is None else _pixels(residual)
        parameters = (_floats(scale), _floats(bias - mean * scale), expert, patch_size, gelu, _floats(gate), added)
        out = _map(OPS.patch_affine(pixels, *parameters))
        ctx.mark_non_differentiable(*moments)
        return out, *moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_moments: Tensor) -> tuple[Any, ...]:
        *inputs, rstd, mean, share = ctx.saved_tensors
        if _differentiable():

            def norm(*inputs: Any) -> Tensor:
                return _reference_norm(*inputs).out

            return _again(norm, ctx, grad, (*inputs, *ctx.settings))
        x, weight, bias, expert, gate, residual, _, _ = inputs
        size, gelu, _, total = ctx.settings
        grads, pixels, of_gate = _pixels(grad), _pixels(x), _floats(gate)
        scale = weight * rstd
        affine = (scale.float(), (bias - mean * scale).float())
        # Of g, the gradient before the affine map, the sum over each expert's pixels, and that of g * (x - mean).
        plain, centred, grad_gate = OPS.patch_affine_sums(
            grads, pixels, *affine, expert, size, len(weight), gelu, of_gate, mean
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            of_all = (plain, centred) if total is None else (total(plain), total(centred))
            slope = -scale * rstd.square() * of_all[1] * share
            offset = -scale * of_all[0] * share - slope * mean
            settings = (expert, size, gelu, of_gate, slope.float(), offset.float())
            grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, *affine, *settings))
        return (
            grad_x,
            (centred * rstd).to(weight.dtype),
            plain.to(bias.dtype),
            None,
            None if gate is None else grad_gate.to(gate.dtype),
            None if residual is None else grad,
            *[None] * 6,
        )


class _PatchPerceptron(torch.autograd.Function):
    """`patch_perceptron` of the compiled library; what lies between is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, patch_size: int) -> Tensor:
        ctx.save_for_backward(x, weight, rows, columns)
        ctx.patch_size = patch_size
        return OPS.patch_perceptron(_pixels(x), weight.contiguous(), rows, columns, patch_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = (*ctx.saved_tensors, ctx.patch_size)
        if _differentiable():
            return _again(reference.patch_perceptron, ctx, grad, inputs)
        needs_x = ctx.needs_input_grad[0]
        x, weight, rows, columns, patch_size = inputs
        grad_x, *others = OPS.patch_perceptron_backward(
            grad.contiguous(), _pixels(x), weight.contiguous(), rows, columns, patch_size, needs_x
        )
        return (_map(grad_x) if needs_x else None, *others, None)
