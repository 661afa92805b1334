"""The lowered convolution against the naive one, patch by patch."""

import pytest
import reference
import torch

from pcenet.exporting.lowering import Lowering
from pcenet.ops import Affine


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
def test_two_convolutions_one_after_the_other(side, kernel, neighbours, opaque):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, 11)
    expert = torch.randint(3, (3 * -(-9 // side) * -(-11 // side),))
    first, second = torch.randn(3, 7, 5, kernel, kernel), torch.randn(3, 4, 7, kernel, kernel)
    scale, shift, gate, residual = (
        torch.rand(3, 7),
        torch.randn(3, 7),
        torch.rand(len(expert)),
        torch.randn(3, 4, 9, 11),
    )
    places, lowered = (expert, side, neighbours), Lowering(opaque)
    hidden = lowered(x, first, *places, base=None, then=Affine(scale, shift, gelu=True))
    base = torch.randn(4, 7, kernel, kernel)
    out = lowered(hidden, second, *places, base=base, then=Affine(gate=gate, residual=residual))
    owners = expert.tolist()
    expected = reference.patch_conv2d(x, first, None, owners, side, neighbours)
    expected = reference.patch_affine(expected, scale, shift, owners, side, True, None, None)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    expected = reference.patch_conv2d(expected, second, base, owners, side, neighbours)
    expected = reference.patch_affine(expected, None, None, owners, side, False, gate, residual)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
