"""Every form of a patch's convolution against torch's own, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn import kernels
from pcenet.nn.kernels import Kernel, MatrixKernel, WindowKernel, WinogradKernel

# Without margin a matrix has every pixel of a patch read every other one, which a kernel of 3x3 does up to side 2.
SUPPORTED = [
    *((WindowKernel, side, margin) for side in range(1, 6) for margin in (0, 1)),
    *((MatrixKernel, side, 0) for side in (1, 2)),
    *((MatrixKernel, side, 1) for side in range(1, 6)),
    *((WinogradKernel, side, margin) for side in (2, 4) for margin in (0, 1)),
]


def windows_of(kernel: Kernel, patches: Tensor, margin: int) -> Tensor:
    """What a kernel reads of ``[n, C, S + 2m, S + 2m]``, in the order that `make_windows` documents."""
    if kernel.spots == 1:
        return patches.permute(0, 2, 3, 1).flatten(1, 2)
    assert margin == 1
    cells = [
        patches[:, :, row_spot + row_tap, column_spot + column_tap]
        for row_spot in range(kernel.spots)
        for column_spot in range(kernel.spots)
        for row_tap in range(kernel.taps)
        for column_tap in range(kernel.taps)
    ]
    return torch.stack(cells, dim=1)


def check_against_torch(kind: type[Kernel], side: int, margin: int, count: int) -> None:
    """Expert 1 of two. The gradient for the windows is carried on to the patches, as a gather's backward pass does."""
    patches = torch.randn(count, 5, side + 2 * margin, side + 2 * margin, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(count, 3, side, side, dtype=torch.float64)
    expected = F.conv2d(patches, weight[1], padding=1 - margin)
    expected_grads = torch.autograd.grad((expected * direction).sum(), [patches, weight])

    kernel = kind(weight, side, margin)
    windows = windows_of(kernel, patches, margin)
    own_weight = kernel.weight[1]
    found = kernel.apply(windows.detach(), own_weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, check_stride=False)
    for_windows, for_weight = kernel.gradients(windows.detach(), own_weight.detach(), direction, True)
    found_grads = torch.autograd.grad([windows, own_weight], [patches, weight], [for_windows, for_weight])
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-12, atol=1e-12, check_stride=False)
    _, alone = kernel.gradients(windows.detach(), own_weight.detach(), direction, False)
    torch.testing.assert_close(alone, for_weight, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "side", "margin"), SUPPORTED)
def test_kernels_equal_a_convolution(kind: type[Kernel], side: int, margin: int) -> None:
    check_against_torch(kind, side, margin, 7)


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("side", [2, 4])
def test_winograd_in_several_chunks(side: int, margin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(S + 2)^2 values of at most 5 channels, of 3 patches at a time: chunks of 3, 3 and 1."""
    monkeypatch.setattr(kernels, "_CACHED_NUMBERS", 3 * 5 * (side + 2) ** 2)
    weight = torch.zeros(1, 3, 5, 3, 3)
    assert len(WinogradKernel(weight, side, margin)._chunks(7, weight[0])) == 3
    check_against_torch(WinogradKernel, side, margin, 7)


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("side", [2, 4])
def test_winograd_rounds_little_more_than_a_convolution(side: int, margin: int) -> None:
    """Root mean square errors in float32, against float64, of sums of 9 x 64 products."""
    patches = torch.randn(200, 64, side + 2 * margin, side + 2 * margin, dtype=torch.float64)
    weight = torch.randn(1, 64, 64, 3, 3, dtype=torch.float64)
    exact = F.conv2d(patches, weight[0], padding=1 - margin)
    direct = F.conv2d(patches.float(), weight[0].float(), padding=1 - margin)
    kernel = WinogradKernel(weight.float(), side, margin)
    found = kernel.apply(windows_of(kernel, patches.float(), margin), kernel.weight[0])
    error, usual = ((y - exact).square().mean().sqrt() for y in (found, direct))
    assert usual > 0
    assert error < 5 * usual
