"""What the operators mean, and which backend computes them.

A map ``[B, C, H, W]`` is cut into patches of S x S pixels, numbered row by row within an image, image by image; the
last row and column of patches may stick out of the map. ``expert`` ``[N]`` says whose each patch is, -1 for nobody's.
Every operator takes and gives maps, whose shapes do not depend on who is whose; sorting patches by expert is a private
matter of a backend.

Axes: B images, C channels in, D channels out, H x W the map, N patches, E experts, S patch side, K kernel side. With k
experts per patch there are k*B images, one map for each choice: ``torch.cat([x] * k)`` and experts ``[k * N]``.

Where the compiled library runs (`pcenet.ops.backend`), these are its operators with gradients of their own; everything
else, second derivatives and transforms of `torch.func` among it, takes `pcenet.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from pcenet.ops import library, reference

OPS = torch.ops.pcenet


def patch_conv2d(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    patch_size: int,
    neighbours: bool = True,
    *,
    base: Tensor | None = None,
) -> Tensor:
    """Convolve every pixel with the kernel of its patch's expert.

    Args:
        x: ``[B, C, H, W]``; under autocast it is cast, as for a convolution.
        weight: ``[E, D, C, K, K]``, K = 1 or 3.
        expert: ``[N]`` int64.
        patch_size: S.
        neighbours: whether taps beyond a patch read the pixels there, or zero. Beyond the map they read zero.
        base: ``[D, C, K, K]``, added to every expert's kernel; None: 0.

    Returns:
        ``[B, D, H, W]``, channels-last; zero where a patch is nobody's.
    """
    x = _autocast(x)
    if not _compiled(x, weight):
        return _reference_conv2d(x, weight, base, expert, patch_size, neighbours)
    inputs = (x, weight, base, expert, patch_size, neighbours)
    out: Tensor = _PatchConv2d.apply(*inputs) if _tracked(x, weight, base) else _conv2d(*inputs)
    return out


def _conv2d(
    x: Tensor, weight: Tensor, base: Tensor | None, expert: Tensor, patch_size: int, neighbours: bool
) -> Tensor:
    kernels, nothing = (_kernel(weight), _kernel(base)), (None, None, False, None, None)
    return _map(OPS.patch_conv2d(_pixels(x), *kernels, expert, patch_size, neighbours, *nothing))


def _reference_conv2d(
    x: Tensor, weight: Tensor, base: Tensor | None, expert: Tensor, patch_size: int, neighbours: bool
) -> Tensor:
    kernels = weight if base is None else weight + base
    return reference.patch_conv2d(x, kernels.to(x.dtype), expert, patch_size, neighbours)


def patch_conv2d_affine(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    patch_size: int,
    neighbours: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    base: Tensor | None = None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`patch_conv2d` and then `patch_affine`; in one pass over the map where nothing needs a gradient."""
    if (lowered := library.lowered()) is not None:
        places = (expert, patch_size, neighbours)
        return lowered(x, weight, *places, scale, shift, base=base, gelu=gelu, gate=gate, residual=residual)
    x = _autocast(x)
    if not _compiled(x, weight, residual) or _tracked(x, weight, base, scale, shift, gate, residual):
        out = patch_conv2d(x, weight, expert, patch_size, neighbours, base=base)
        return patch_affine(out, scale, shift, expert, patch_size, gelu=gelu, gate=gate, residual=residual)
    added = None if residual is None else _pixels(residual)
    parts = (_kernel(weight), _kernel(base))
    parameters = (_floats(scale), _floats(shift), gelu, _floats(gate), added)
    return _map(OPS.patch_conv2d(_pixels(x), *parts, expert, patch_size, neighbours, *parameters))


class ConvNorm(NamedTuple):
    """A convolution and the batch normalisation by running statistics that follows it, expert by expert.

    Attributes:
        weight: ``[E, D, C, K, K]``.
        base: ``[D, C, K, K]`` or None, see `patch_conv2d`.
        neighbours: likewise.
        norm: weight, bias, running mean and running variance, ``[E, D]`` each.
        eps: added to variances.
    """

    weight: Tensor
    base: Tensor | None
    neighbours: bool
    norm: tuple[Tensor, Tensor, Tensor, Tensor]
    eps: float


def expert_block(
    x: Tensor,
    expert: Tensor,
    patch_size: int,
    first: ConvNorm,
    second: ConvNorm,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What an expert computes at evaluation: ``residual + gate * second(gelu(first(x)))``; in one call where nothing
    needs a gradient."""
    x = _autocast(x)
    tensors = (x, first.weight, first.base, *first.norm, second.weight, second.base, *second.norm)
    if not _compiled(x, first.weight, residual) or _tracked(*tensors, gate, residual):
        affine = (affine_of(*first.norm, first.eps), affine_of(*second.norm, second.eps))
        hidden = patch_conv2d_affine(
            x, first.weight, expert, patch_size, first.neighbours, *affine[0], base=first.base, gelu=True
        )
        settings = (second.weight, expert, patch_size, second.neighbours, *affine[1])
        return patch_conv2d_affine(hidden, *settings, base=second.base, gate=gate, residual=residual)
    parts = [
        (_kernel(part.weight), _kernel(part.base), list(part.norm), part.eps, part.neighbours)
        for part in (first, second)
    ]
    added = None if residual is None else _pixels(residual)
    return _map(OPS.expert_block(_pixels(x), expert, patch_size, *parts[0], *parts[1], _floats(gate), added))


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The scale and shift, in float32 at least, that a batch normalisation by running statistics is."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(variance.to(dtype) + eps) * weight
    return scale, torch.addcmul(bias.to(dtype), mean.to(dtype), scale, value=-1)


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
    if not _compiled(x, residual):
        return reference.patch_affine(x, scale, shift, expert, patch_size, gelu, gate, residual)
    inputs = (x, scale, shift, expert, patch_size, gelu, gate, residual)
    out: Tensor = _PatchAffine.apply(*inputs) if _tracked(x, scale, shift, gate, residual) else _affine(*inputs)
    return out


def _affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    expert: Tensor,
    patch_size: int,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    added = None if residual is None else _pixels(residual)
    parameters = (_floats(scale), _floats(shift), expert, patch_size, gelu, _floats(gate), added)
    return _map(OPS.patch_affine(_pixels(x), *parameters))


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
    number: Tensor
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
    if not _compiled(x, residual) or weight.dtype == torch.float64:
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


def patch_perceptron(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, patch_size: int) -> Tensor:
    """The first layer of a perceptron on every pixel and its position, averaged over the real pixels of each patch:
    ``mean(gelu(weight [x, rows + columns] + bias))``.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[D, C + F]``.
        bias: ``[D]``.
        rows: ``[H, F]``, features of a pixel's row.
        columns: ``[W, F]``, features of its column.
        patch_size: S.

    Returns:
        ``[N, D]``.
    """
    inputs = (x, weight, bias, rows, columns)
    if not _compiled(x, weight) or x.dtype != torch.float32:
        return _reference_perceptron(*inputs, patch_size)
    if not _tracked(*inputs):
        return _perceptron(*inputs, patch_size)
    out: Tensor = _PatchPerceptron.apply(*inputs, patch_size)
    return out


def patch_logits(
    x: Tensor,
    hidden: tuple[Tensor, Tensor, Tensor, Tensor],
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    *,
    expert_bias: Tensor | None = None,
    centring: Tensor | None = None,
) -> Tensor:
    """What a router computes at evaluation: the second layer of the perceptron, then `centred`; in one call where
    nothing needs a gradient.

    Args:
        x: ``[B, C, H, W]``.
        hidden: weight, bias, rows and columns of `patch_perceptron`.
        patch_size: S.
        weight: ``[E, D]``.
        bias: ``[E]``.
        expert_bias: see `centred`; None: logits stay as they are.
        centring: likewise; where there is a bias.

    Returns:
        ``[N, E]``.
    """
    tensors = (x, *hidden, weight, bias)
    if _compiled(*tensors) and x.dtype == torch.float32 and not _tracked(*tensors):
        first, second = [each.contiguous() for each in hidden], (weight.contiguous(), bias)
        out: Tensor = OPS.patch_logits(_pixels(x), *first, patch_size, *second, _floats(expert_bias), _floats(centring))
        return out
    logits = F.linear(patch_perceptron(x, *hidden, patch_size), weight, bias)
    return logits if expert_bias is None or centring is None else centred(logits, x.shape[0], expert_bias, centring)


def centred(logits: Tensor, images: int, expert_bias: Tensor, centring: Tensor) -> Tensor:
    """Logits ``[N, E]`` less ``centring`` times their mean over each image, and each expert's bias ``[E]`` added."""
    of_image = logits.unflatten(0, (images, -1))
    level = of_image.mean(1, keepdim=True)
    shift = torch.addcmul(expert_bias.to(logits.dtype), level, centring.to(logits.dtype), value=-1)
    return (of_image + shift).flatten(0, 1)


def _perceptron(*inputs: Any) -> Tensor:
    x, *layer, patch_size = inputs
    out: Tensor = OPS.patch_perceptron(_pixels(x), *(each.contiguous() for each in layer), patch_size)
    return out


def _reference_perceptron(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, patch_size: int
) -> Tensor:
    content, position = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
    lines = (F.linear(rows, position, bias), F.linear(columns, position))
    return reference.patch_perceptron(x, content, *lines, patch_size)


def _pixels(x: Tensor) -> Tensor:
    """A map as the compiled operators take it, ``[B, H, W, C]``: of one that is channels-last, a view."""
    return x.permute(0, 2, 3, 1).contiguous()


def _map(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def _kernel(weight: Tensor | None) -> Tensor | None:
    """A weight as the compiled operators take it, float32 with taps in equal steps, in whatever layout."""
    if weight is None:
        return None
    rows, columns = weight.stride()[-2:]
    evenly = weight.shape[-1] == 1 or rows == weight.shape[-1] * columns
    return (weight if evenly else weight.contiguous()).float()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def autocast_enabled(x: Tensor) -> bool:
    """Whether operators on the device of a tensor are to run in another type."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor) -> Tensor:
    if not autocast_enabled(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _compiled(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled library computes an operator on these tensors, those of them that there are."""
    return library.takes(x, *others) and not transforming()


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


def _typed(grad: Tensor | None, like: Tensor | None, needed: bool = True) -> Tensor | None:
    """A gradient in the type of the tensor that it is of; None where there is no such tensor, or nobody asks."""
    return grad.to(like.dtype) if needed and grad is not None and like is not None else None


def _differentiable() -> bool:
    """Whether somebody wants gradients of the gradients that a backward pass computes."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _PatchConv2d(torch.autograd.Function):
    """`patch_conv2d` of the compiled library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, patch_size, neighbours = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = (patch_size, neighbours)
        return _conv2d(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, base, expert = inputs = ctx.saved_tensors
        if _differentiable():
            return _again(_reference_conv2d, ctx, grad, (*inputs, *ctx.settings))
        needs_x, needs_weight, needs_base, *_ = ctx.needs_input_grad
        grads, settings = _pixels(grad), (expert, *ctx.settings)
        grad_x = grad_weight = grad_base = None
        if needs_x:
            grad_x = _map(OPS.patch_conv2d_input_grad(grads, _kernel(weight), _kernel(base), *settings)).to(x.dtype)
        if needs_weight or needs_base:
            taps_last = OPS.patch_conv2d_weight_grad(grads, _pixels(x), *settings, weight.shape[0], weight.shape[3])
            of_experts = taps_last.permute(0, 1, 4, 2, 3)
            grad_weight = _typed(of_experts, weight, needs_weight)
            grad_base = _typed(of_experts.sum(0), base) if needs_base else None
        return grad_x, grad_weight, grad_base, None, None, None


class _PatchAffine(torch.autograd.Function):
    """`patch_affine` of the compiled library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale, shift, expert, ctx.patch_size, ctx.gelu, gate, residual = inputs
        ctx.save_for_backward(x, scale, shift, expert, gate, residual)
        return _affine(*inputs)

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
            grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, *affine, *settings)).to(x.dtype)
        return (
            grad_x,
            _typed(grad_scale, scale, need_scale),
            _typed(grad_shift, shift, need_shift),
            None,
            None,
            None,
            _typed(grad_gate, gate, need_gate),
            _typed(grad, residual, need_residual),
        )


class _ExpertNorm(torch.autograd.Function):
    """`expert_norm` of the compiled library; its statistics are functions of x."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, patch_size, gelu, eps, total = inputs
        x, weight, bias, expert, gate, residual, running_mean, running_var = tensors
        moments = OPS.expert_moments(_pixels(x), expert, patch_size, len(weight))
        rstd, mean, share, moments = _standardising(moments, running_mean, running_var, eps, total)
        ctx.save_for_backward(*tensors, rstd, mean, share)
        ctx.settings = (patch_size, gelu, eps, total)
        scale = weight * rstd
        ctx.mark_non_differentiable(*moments)
        return _affine(x, scale, bias - mean * scale, expert, patch_size, gelu, gate, residual), *moments

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
            grad_x = _map(OPS.patch_affine_input_grad(grads, pixels, *affine, *settings)).to(x.dtype)
        return (
            grad_x,
            _typed(centred * rstd, weight),
            _typed(plain, bias),
            None,
            _typed(grad_gate, gate),
            _typed(grad, residual),
            *[None] * 6,
        )


class _PatchPerceptron(torch.autograd.Function):
    """`patch_perceptron` of the compiled library; what lies between is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:-1])
        ctx.patch_size = inputs[-1]
        return _perceptron(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = (*ctx.saved_tensors, ctx.patch_size)
        if _differentiable():
            return _again(_reference_perceptron, ctx, grad, inputs)
        x, weight, bias, rows, columns, patch_size = inputs
        needs_x = ctx.needs_input_grad[0]
        layer = (each.contiguous() for each in (weight, bias, rows, columns))
        grad_x, of_content, of_rows, of_columns = OPS.patch_perceptron_backward(
            grad.contiguous(), _pixels(x), *layer, patch_size, needs_x
        )
        of_position = of_rows.T @ rows + of_columns.T @ columns
        grad_weight = torch.cat((of_content, of_position), dim=1)
        return _map(grad_x) if needs_x else None, grad_weight, of_rows.sum(0), None, None, None
