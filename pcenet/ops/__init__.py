"""The only compute of the experts: operators on maps whose patches have experts. Imports torch alone."""

from pcenet.ops.functional import (
    Normed,
    expert_moments,
    expert_norm,
    patch_affine,
    patch_conv2d,
    patch_conv2d_affine,
    patch_perceptron,
)

__all__ = [
    "Normed",
    "expert_moments",
    "expert_norm",
    "patch_affine",
    "patch_conv2d",
    "patch_conv2d_affine",
    "patch_perceptron",
]
