"""The operators ``torch.ops.pcenet.*`` as torch knows them, whatever computes them: arguments, shapes, multiply-adds.

Maps are pixels ``[B, H, W, C]``; axes as in `pcenet.ops.functional`. What an operator makes of a map has the map's
type, or that of a residual which is wider; everything else is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_AFFINE = "Tensor? scale, Tensor? shift, bool gelu, Tensor? gate"
_PLACES = "Tensor expert, int patch_size"
_LAYER = "Tensor weight, Tensor bias, Tensor rows, Tensor columns, int patch_size"
_THREE, _FOUR = (f"({', '.join(['Tensor'] * number)})" for number in (3, 4))

SCHEMAS = {
    "patch_conv2d": f"(Tensor x, Tensor weight, Tensor? base, {_PLACES}, bool neighbours, {_AFFINE}, Tensor? residual)"
    " -> Tensor",
    "patch_conv2d_input_grad": f"(Tensor grad, Tensor weight, Tensor? base, {_PLACES}, bool neighbours) -> Tensor",
    "patch_conv2d_weight_grad": f"(Tensor grad, Tensor x, {_PLACES}, bool neighbours, int num_experts, int kernel_size)"
    " -> Tensor",
    "patch_affine": f"(Tensor x, {_PLACES}, {_AFFINE}, Tensor? residual) -> Tensor",
    "expert_moments": f"(Tensor x, {_PLACES}, int num_experts) -> {_THREE}",
    "patch_affine_sums": f"(Tensor grad, Tensor x, {_PLACES}, int num_experts, {_AFFINE}, Tensor? centre) -> {_THREE}",
    "patch_affine_input_grad": f"(Tensor grad, Tensor x, {_PLACES}, {_AFFINE}, Tensor? slope, Tensor? offset)"
    " -> Tensor",
    "balancing_bias": "(Tensor logits, int top_k, int sweeps, float damping) -> Tensor",
    "expert_block": f"(Tensor x, {_PLACES}, Tensor weight1, Tensor? base1, Tensor[] norm1, float eps1, "
    "bool neighbours1, Tensor weight2, Tensor? base2, Tensor[] norm2, float eps2, bool neighbours2, "
    "Tensor? gate, Tensor? residual) -> Tensor",
    "patch_perceptron": f"(Tensor x, {_LAYER}) -> Tensor",
    "patch_logits": f"(Tensor x, {_LAYER}, Tensor weight2, Tensor bias2, Tensor? expert_bias, Tensor? centring)"
    " -> Tensor",
    "patch_perceptron_backward": f"(Tensor grad, Tensor x, {_LAYER}, bool needs_x) -> {_FOUR}",
}


def _patches(x: Any, size: int) -> int:
    return x[0] * -(-x[1] // size) * -(-x[2] // size)


# Of each operator's inputs, the shapes of its outputs.
SHAPES: dict[str, Callable[..., Any]] = {
    "patch_conv2d": lambda x, weight, *_: [(*x.shape[:3], weight.shape[1])],
    "patch_conv2d_input_grad": lambda grad, weight, *_: [(*grad.shape[:3], weight.shape[2])],
    "patch_conv2d_weight_grad": lambda grad, x, _, __, ___, experts, kernel: [
        (experts, grad.shape[3], kernel, kernel, x.shape[3])
    ],
    "patch_affine": lambda x, *_: [x.shape],
    "expert_moments": lambda x, _, __, experts: [(experts,), *[(experts, x.shape[3])] * 2],
    "patch_affine_sums": lambda _, x, expert, __, experts, *___: [*[(experts, x.shape[3])] * 2, expert.shape],
    "patch_affine_input_grad": lambda _, x, *__: [x.shape],
    "balancing_bias": lambda logits, *_: [logits.shape[1:]],
    "expert_block": lambda x, _, __, *parts: [(*x.shape[:3], parts[5].shape[1])],
    "patch_perceptron": lambda x, weight, *others: [(_patches(x.shape, others[3]), weight.shape[0])],
    "patch_logits": lambda x, *others: [(_patches(x.shape, others[4]), others[5].shape[0])],
    "patch_perceptron_backward": lambda _, x, weight, *others: [
        x.shape if others[-1] else (0,),
        (weight.shape[0], x.shape[3]),
        *[(size, weight.shape[0]) for size in x.shape[1:3]],
    ],
}

# Those that the Triton backend has.
OF_TRITON = (
    "patch_conv2d",
    "patch_conv2d_input_grad",
    "patch_conv2d_weight_grad",
    "patch_affine",
    "expert_moments",
    "patch_affine_sums",
    "patch_affine_input_grad",
)

# Those whose first output is a map: which of their inputs it is made of, and whether the last one is a residual.
MAPS = {
    "patch_conv2d": (0, True),
    "patch_conv2d_input_grad": (0, False),
    "patch_affine": (0, True),
    "patch_affine_input_grad": (1, False),
    "expert_block": (0, True),
}


def map_type(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.dtype:
    """The type of what an operator makes of a map."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _convolution_flops(pixels: Any, weight: Any) -> int:
    return 2 * math.prod(pixels[:3]) * math.prod(weight[1:])


def _perceptron_flops(x: Any, weight: Any) -> int:
    content, position = math.prod(x[:3]) * x[3], (x[1] + x[2]) * (weight[1] - x[3])
    return 2 * weight[0] * (content + position)


# Of the inputs' shapes, what `torch.utils.flop_counter.FlopCounterMode` counts: two for a multiply-add.
FLOPS: dict[str, Callable[..., int]] = {
    "patch_conv2d": lambda x, weight, *_: _convolution_flops(x, weight),
    "patch_conv2d_input_grad": lambda grad, weight, *_: _convolution_flops(grad, weight),
    "patch_conv2d_weight_grad": lambda grad, x, *others: _convolution_flops(x, (0, grad[3], x[3], *[others[-1]] * 2)),
    "expert_block": lambda x, _, __, *parts: _convolution_flops(x, parts[0]) + _convolution_flops(x, parts[5]),
    "patch_perceptron": lambda x, weight, *_: _perceptron_flops(x, weight),
    "patch_logits": lambda x, weight, *others: (
        _perceptron_flops(x, weight) + 2 * _patches(x, others[3]) * math.prod(others[4])
    ),
    # The first layer is computed again, then for the weight, and perhaps for x.
    "patch_perceptron_backward": lambda _, x, weight, *others: (2 + others[-1]) * _perceptron_flops(x, weight),
}


def register() -> None:
    """Make the operators known to torch: their arguments, and what its tracers and its FlopCounterMode ask."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"pcenet::{name}", schema)
        torch.library.register_fake(f"pcenet::{name}", _fake(name))
    for name, flops in FLOPS.items():

        def formula(*shapes: Any, flops: Callable[..., int] = flops, **_: Any) -> int:
            return flops(*shapes)

        register_flop_formula(getattr(torch.ops.pcenet, name))(formula)


def _fake(name: str) -> Callable[..., Any]:
    def fake(*inputs: Any) -> Any:
        shapes = SHAPES[name](*inputs)
        types = [torch.float32] * len(shapes)
        if name in MAPS:
            own, has_residual = MAPS[name]
            types[0] = map_type(inputs[own], inputs[-1] if has_residual else None)
        outs = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)]
        return outs[0] if len(outs) == 1 else tuple(outs)

    return fake


register()  # at import: FlopCounterMode copies the registry when it is made, perhaps before any layer has run
