"""Each form of a convolution against torch's own, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcenet.nn import kernels
from pcenet.nn.kernels import Kernel, MatrixKernel, PlainKernel, WindowKernel, WinogradKernel, winograd_matrices

FORMS = [
    *((WindowKernel, side) for side in (1, 2, 3, 4, 5, 8)),
    *((MatrixKernel, side) for side in (1, 2)),
    *((WinogradKernel, side) for side in (2, 4)),
]


def windows_of(kernel: Kernel, patches: Tensor) -> Tensor:
    """What the kernel reads of patches ``[n, C, S + 2m, S + 2m]`` that come with their margin, listed by loops."""
    listed = []
    for patch in patches:
        cells = [
            patch[:, row_spot + row_tap, column_spot + column_tap]
            for row_spot in range(kernel.spots)
            for column_spot in range(kernel.spots)
            for row_tap in range(kernel.taps)
            for column_tap in range(kernel.taps)
        ]
        listed.append(torch.stack(cells))
    return torch.stack(listed)


def setting(form: type[Kernel], side: int, margin: int) -> tuple[Kernel, Tensor, Tensor]:
    """A kernel of two experts, their weights, and five patches with their margin."""
    weight = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    patches = torch.randn(5, 3, side + 2 * margin, side + 2 * margin, dtype=torch.float64, requires_grad=True)
    return form(weight, side, margin), weight, patches


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize(("form", "side"), FORMS)
def test_equals_torchs_convolution(form: type[Kernel], side: int, margin: int) -> None:
    kernel, weight, patches = setting(form, side, margin)
    expected = F.conv2d(patches, weight[1], padding=1 - margin)
    actual = kernel.apply(windows_of(kernel, patches), kernel.weight[1])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, check_stride=False)


@pytest.mark.parametrize("numbers", [2**20, 60])
@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize(("form", "side"), FORMS)
def test_gradients_equal_those_of_torchs_convolution(
    form: type[Kernel], side: int, margin: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once and, where the kernel works in stretches, patch by patch."""
    monkeypatch.setattr(kernels, "_CACHED_NUMBERS", numbers)
    kernel, weight, patches = setting(form, side, margin)
    out = F.conv2d(patches, weight[1], padding=1 - margin)
    direction = torch.randn_like(out)
    for_patches, for_weight = torch.autograd.grad((out * direction).sum(), [patches, weight])
    windows, own = windows_of(kernel, patches), kernel.weight[1]
    for_windows, for_own = kernel.gradients(windows.detach(), own.detach(), direction, True)
    # Through the listing of the windows and the arranging of the weights, which autograd can do.
    through = torch.autograd.grad([windows, own], [patches, weight], [for_windows, for_own])
    for ours, theirs in zip(through, (for_patches, for_weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, check_stride=False)
    _, alone = kernel.gradients(windows.detach(), own.detach(), direction, False)
    torch.testing.assert_close(alone, for_own)


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize(("form", "side"), [form for form in FORMS if issubclass(form[0], PlainKernel)])
def test_blocks_go_through_their_own_weights(form: type[PlainKernel], side: int, margin: int) -> None:
    """Blocks of 2, 2 patches: the first through expert 1, the second through expert 0."""
    kernel, weight, patches = setting(form, side, margin)
    windows = windows_of(kernel, patches[:4])
    actual = kernel.apply_blocks(windows, kernel.weight[[1, 0]])
    expected = [F.conv2d(patches[i : i + 2], weight[e], padding=1 - margin) for i, e in ((0, 1), (2, 0))]
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-12, atol=1e-12, check_stride=False)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograds_matrices_are_a_correlation(tile: int) -> None:
    """For every pair of unit vectors: output i of a correlation of x_j with w_k is 1 where j = i + k."""
    read, kernel, write = winograd_matrices(tile)
    for j in range(tile + 2):
        for k in range(3):
            out = write @ (kernel[:, k] * read[:, j])
            expected = torch.tensor([float(j == i + k) for i in range(tile)], dtype=torch.float64)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [2, 4])
def test_winograd_rounds_no_worse_than_five_times_a_direct_convolution(side: int) -> None:
    x = torch.randn(200, 64, side + 2, side + 2, dtype=torch.float64)
    weight = torch.randn(1, 64, 64, 3, 3, dtype=torch.float64) / 24
    exact = F.conv2d(x, weight[0])

    def error(out: Tensor) -> float:
        return float((out - exact).square().mean().sqrt())

    kernel = WinogradKernel(weight.float(), side, 1)
    windows = x.float().permute(0, 2, 3, 1).flatten(1, 2)
    assert error(kernel.apply(windows, kernel.weight[0])) < 5 * error(F.conv2d(x.float(), weight[0].float()))


def test_which_form_is_taken() -> None:
    weight = torch.randn(2, 4, 3, 3, 3)
    forms = {1: MatrixKernel, 2: WinogradKernel, 3: WindowKernel, 4: WinogradKernel, 5: WindowKernel}
    assert {side: type(kernels.make_kernel(weight, side, 1)) for side in forms} == forms
    low = weight.bfloat16()
    forms = {1: MatrixKernel, 2: MatrixKernel, 3: WindowKernel, 4: WindowKernel}
    assert {side: type(kernels.make_kernel(low, side, 1)) for side in forms} == forms
    assert {side: type(kernels.make_plain_kernel(weight, side, 1)) for side in forms} == forms
