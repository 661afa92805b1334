"""What the operators mean, and which backend computes them.

A map ``[B, C, H, W]`` is cut into patches of S x S pixels, numbered row by row within an image, image by image; the
last row and column of patches may stick out of the map. ``expert`` ``[N]`` int64 says whose each patch is, -1 for
nobody's. Every operator takes and gives maps, whose shapes do not depend on who is whose; sorting patches by expert is
a private matter of a backend.

Axes: B images, C channels in, D channels out, H x W the map, N patches, E experts, S patch side, K kernel side. With k
experts per patch there are k*B images, one map for each choice: ``torch.cat([x] * k)`` and experts ``[k * N]``.

Where kernels run, the compiled library's or Triton's (`pcenet.ops.backend`), `pcenet.ops.compiled` calls them, with
gradients of their own; everything else, second derivatives and transforms of `torch.func` among it, takes
`pcenet.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.ops import compiled, library, reference
from pcenet.ops.compiled import autocast, runs, tracked, without_autocast
from pcenet.ops.reference import Affine


def patch_conv2d(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    patch_size: int,
    neighbours: bool = True,
    *,
    base: Tensor | None = None,
    then: Affine | None = None,
) -> Tensor:
    """Convolve every pixel with the kernel of its patch's expert.

    Args:
        x: ``[B, C, H, W]``; under autocast it is cast, as for a convolution.
        weight: ``[E, D, C, K, K]``, K = 1 or 3.
        expert: ``[N]``.
        patch_size: S.
        neighbours: whether taps beyond a patch read the pixels there, or zero. Beyond the map they read zero.
        base: ``[D, C, K, K]``, added to every expert's kernel; None: 0.
        then: what `patch_affine` makes of the result; in the same pass over the map where nothing needs a gradient.

    Returns:
        ``[B, D, H, W]``, channels-last; zero where a patch is nobody's.
    """
    if (lowered := library.lowered()) is not None:
        return lowered(x, weight, expert, patch_size, neighbours, base=base, then=then or Affine())
    x = autocast(x)
    inputs = (x, weight, base, expert, patch_size, neighbours)
    if not runs("patch_conv2d", x, weight):
        out = reference.patch_conv2d(*inputs)
    elif tracked(x, weight, base, *(then or ())) or (then is not None and not runs("patch_conv2d", x, then.residual)):
        out = compiled.apply(compiled.CONVOLUTION, *inputs)
    else:
        return compiled.patch_conv2d(*inputs, then)
    return out if then is None else patch_affine(out, expert, patch_size, then)


def patch_affine(x: Tensor, expert: Tensor, patch_size: int, affine: Affine) -> Tensor:
    """Scale and shift each patch of a map ``[B, C, H, W]`` by what its expert has, and what else `Affine` says."""
    inputs = (x, expert, patch_size, *affine)
    return (
        compiled.apply(compiled.AFFINE, *inputs)
        if runs("patch_affine", x, affine.residual)
        else reference.patch_affine(*inputs)
    )


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
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What an expert computes at evaluation: ``residual + gate * second(gelu(first(x)))``; in one call where nothing
    needs a gradient."""
    x = autocast(x)
    tensors = (first.weight, first.base, *first.norm, second.weight, second.base, *second.norm, gate, residual)
    if runs("expert_block", x, first.weight, residual) and not tracked(x, *tensors):
        return compiled.expert_block(x, expert, patch_size, first, second, gate, residual)
    hidden = Affine(*affine_of(*first.norm, first.eps), gelu=True)
    out = Affine(*affine_of(*second.norm, second.eps), gate=gate, residual=residual)
    x = patch_conv2d(x, first.weight, expert, patch_size, first.neighbours, base=first.base, then=hidden)
    return patch_conv2d(x, second.weight, expert, patch_size, second.neighbours, base=second.base, then=out)


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The scale and shift, in float32 at least, that a batch normalisation by running statistics is."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(variance.to(dtype) + eps) * weight
    return scale, torch.addcmul(bias.to(dtype), mean.to(dtype), scale, value=-1)


def expert_moments(x: Tensor, expert: Tensor, patch_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each expert's pixels on the map ``[B, C, H, W]`` their number ``[E]``, and by channel mean and biased variance
    ``[E, C]``, in float32 at least; zeros for an expert without any.

    Differentiable where the reference runs; `expert_norm` needs no gradient of it elsewhere.
    """
    inputs = (x, expert, patch_size, num_experts)
    return compiled.expert_moments(*inputs) if runs("expert_moments", x) else reference.expert_moments(*inputs)


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
    running: tuple[Tensor, Tensor],
    eps: float,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Normed:
    """Batch normalisation by the statistics of each expert's own pixels, then what `Affine` says.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[E, C]``.
        bias: ``[E, C]``.
        expert: ``[N]``.
        patch_size: S.
        running: mean and variance ``[E, C]`` for experts with fewer than 2 pixels, whose statistics say nothing.
        eps: added to variances.
        gelu: as in `Affine`; so are the next two.
        gate: ``[N]``.
        residual: ``[B, C, H, W]``.
        total: sums a tensor over all processes that train together, where statistics are theirs; differentiable.
    """
    parts = (gelu, gate, residual)
    if not runs("patch_affine", x, residual) or weight.dtype == torch.float64:
        out, moments = reference.expert_norm(x, weight, bias, expert, patch_size, *parts, *running, eps, total)
    else:
        own = compiled.expert_moments(x, expert, patch_size, len(weight))
        standard, moments = reference.standardise(own, *running, eps, total)
        # Running statistics are copied: they change before a backward pass asks for them.
        kept = [each.clone() for each in running]
        inputs = (x, weight, bias, expert, patch_size, *parts, *kept, eps, total, *standard)
        out = compiled.apply(compiled.NORM, *inputs)
    return Normed(out, *(each.detach() for each in moments))


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
    inputs = (x, weight, bias, rows, columns, patch_size)
    if runs("patch_perceptron", x, weight) and x.dtype == torch.float32:
        return compiled.apply(compiled.PERCEPTRON, *inputs)
    return reference.patch_perceptron(*inputs)


def patch_logits(
    x: Tensor,
    hidden: tuple[Tensor, Tensor, Tensor, Tensor],
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    expert_bias: Tensor | None = None,
    centring: Tensor | None = None,
) -> Tensor:
    """What a router computes at evaluation: the second layer of the perceptron, then `centred`; in one call where
    nothing needs a gradient. Autocast is off.

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
    inputs = (x, *hidden, weight, bias, expert_bias, centring)
    if runs("patch_logits", x, weight) and x.dtype == torch.float32 and not tracked(*inputs):
        return compiled.patch_logits(x, hidden, patch_size, weight, bias, expert_bias, centring)
    with without_autocast(x):
        logits = F.linear(patch_perceptron(x, *hidden, patch_size), weight, bias)
        return logits if expert_bias is None or centring is None else centred(logits, x.shape[0], expert_bias, centring)


def centred(logits: Tensor, images: int, expert_bias: Tensor, centring: Tensor) -> Tensor:
    """Logits ``[N, E]`` less ``centring`` times their mean over each image, and each expert's bias ``[E]`` added."""
    of_image = logits.unflatten(0, (images, -1))
    level = of_image.mean(1, keepdim=True)
    shift = torch.addcmul(expert_bias.to(logits.dtype), level, centring.to(logits.dtype), value=-1)
    return (of_image + shift).flatten(0, 1)
