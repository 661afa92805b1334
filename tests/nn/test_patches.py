"""Cutting a map into patches and putting it together again."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from pcenet.nn import Grid, PatchExtractor
from pcenet.nn.fourier import position_map

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def test_split_numbers_patches_row_by_row_image_by_image() -> None:
    x = torch.arange(32.0).reshape(2, 1, 4, 4)
    patches, grid = PatchExtractor(2).split(x)
    assert grid == Grid(batch=2, rows=2, columns=2)
    assert grid.patches == 8
    expected = torch.tensor(
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]]], dtype=torch.float32
    )
    torch.testing.assert_close(patches[:4, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(patches[4:, 0], expected + 16, rtol=0, atol=0)


def test_enriched_patches_are_content_then_position() -> None:
    x = torch.arange(16.0, dtype=torch.float64).reshape(1, 1, 4, 4)
    enriched = PatchExtractor(2, num_bands=1)(x)
    assert enriched.shape == (4, 9, 2, 2)
    torch.testing.assert_close(enriched[1, 0], reference.float64([[2.0, 3], [6, 7]]))
    # Patch 1 is the upper right one. The sines: absolute row of 2 is -1, absolute column 1; in the patch -1, 1.
    signs = reference.float64([[[-1.0, -1], [-1, -1]], [[1, 1], [1, 1]], [[-1, -1], [1, 1]], [[-1, 1], [-1, 1]]])
    torch.testing.assert_close(enriched[1, 1::2], signs)
    torch.testing.assert_close(enriched[1, 2::2], torch.zeros(4, 2, 2).double(), rtol=0, atol=1e-15)


def test_padding_is_zeros_at_the_bottom_and_right_with_position_features() -> None:
    x = torch.arange(1.0, 10).double().reshape(1, 1, 3, 3)
    extractor = PatchExtractor(2, num_bands=2)
    patches, grid = extractor.split(x)
    assert grid == Grid(1, 2, 2)
    expected = [[[1, 2], [4, 5]], [[3, 0], [6, 0]], [[7, 8], [0, 0]], [[9, 0], [0, 0]]]
    torch.testing.assert_close(patches[:, 0], reference.float64(expected), rtol=0, atol=0)
    positions = extractor.split(position_map(2, 2, 2, 2, dtype=torch.float64))[0]
    torch.testing.assert_close(extractor(x)[:, 1:], positions, rtol=0, atol=0)


def test_default_has_four_bands_and_so_32_position_channels() -> None:
    extractor = PatchExtractor(4)
    assert extractor(torch.zeros(2, 3, 8, 12)).shape == (2 * 2 * 3, 3 + 32, 4, 4)
    assert list(extractor.parameters()) == []


@given(SIZES, st.integers(1, 5), st.integers(0, 2))
def test_enriched_patches_equal_the_naive_loops(size: tuple[int, int, int, int], side: int, num_bands: int) -> None:
    x = torch.randn(size, dtype=torch.float64)
    actual = PatchExtractor(side, num_bands)(x)
    torch.testing.assert_close(
        actual, reference.enriched_patches(x, side, num_bands), rtol=0, atol=1e-12, check_stride=False
    )


@given(SIZES, st.integers(1, 5))
def test_merge_is_the_inverse_of_split(size: tuple[int, int, int, int], side: int) -> None:
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    extractor = PatchExtractor(side)
    patches, grid = extractor.split(x)
    merged = extractor.merge(patches, grid, (size[2], size[3]))
    torch.testing.assert_close(merged, x, rtol=0, atol=0, check_stride=False)
    (gradient,) = torch.autograd.grad(merged.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(size, dtype=torch.float64), rtol=0, atol=0, check_stride=False)


def test_merge_crops_what_was_padded() -> None:
    patches = torch.full((4, 1, 2, 2), 7.0)
    patches[:, :, 0, 0] = torch.arange(4.0)[:, None]
    merged = PatchExtractor(2).merge(patches, Grid(1, 2, 2), (3, 3))
    torch.testing.assert_close(merged[0, 0], torch.tensor([[0.0, 7, 1], [7, 7, 7], [2, 7, 3]]), check_stride=False)


def test_merge_takes_a_plain_tuple_for_the_grid() -> None:
    x = torch.randn(2, 3, 4, 6)
    extractor = PatchExtractor(2)
    patches, grid = extractor.split(x)
    torch.testing.assert_close(extractor.merge(patches, tuple(grid), (4, 6)), x, check_stride=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_of_the_input_is_kept(dtype: torch.dtype) -> None:
    assert PatchExtractor(2)(torch.zeros(1, 1, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"patch_size": 0}, "patch_size=0"), ({"patch_size": 2, "num_bands": -1}, "num_bands=-1")],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PatchExtractor(**arguments)
