"""The only compute of the experts: operators on maps whose patches have experts. Imports torch alone."""

from pcenet.ops.functional import (
    ConvNorm,
    Normed,
    affine_of,
    centred,
    expert_block,
    expert_moments,
    expert_norm,
    patch_affine,
    patch_conv2d,
    patch_logits,
    patch_perceptron,
)
from pcenet.ops.library import backend, why_reference
from pcenet.ops.reference import Affine

__all__ = [
    "Affine",
    "ConvNorm",
    "Normed",
    "affine_of",
    "backend",
    "centred",
    "expert_block",
    "expert_moments",
    "expert_norm",
    "patch_affine",
    "patch_conv2d",
    "patch_logits",
    "patch_perceptron",
    "why_reference",
]
