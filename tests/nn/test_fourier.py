"""Coordinates and their Fourier features against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pcenet.nn import fourier_features
from pcenet.nn.fourier import centre_coordinates, position_lines, position_map

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [0.0]), (2, [-0.5, 0.5]), (4, [-0.75, -0.25, 0.25, 0.75]), (5, [-0.8, -0.4, 0, 0.4, 0.8])],
)
def test_coordinates_are_the_centres_of_the_cells(n: int, expected: list[float]) -> None:
    torch.testing.assert_close(centre_coordinates(n, dtype=torch.float64), reference.float64(expected))


@given(st.integers(1, 500))
def test_coordinates_never_reach_the_ends(n: int) -> None:
    u = centre_coordinates(n)
    assert u.shape == (n,)
    assert u.abs().max() < 1
    torch.testing.assert_close(u, -u.flip(0), rtol=0, atol=1e-6)


def test_first_and_last_cell_differ_in_their_features() -> None:
    """At -1 and 1 every sine and cosine would agree; at the centres they do not."""
    first, *_, last = fourier_features(centre_coordinates(8, dtype=torch.float64), 4)
    assert (first - last).abs().max() > 0.1


def test_features_are_pairs_of_sine_and_cosine_by_band() -> None:
    # u = 1/4: angles pi/4, pi/2, pi.
    features = fourier_features(torch.tensor([0.25, 0.0], dtype=torch.float64), 3)
    expected = torch.tensor([[HALF, HALF, 1, 0, 0, -1], [0, 1, 0, 1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("num_bands", [0, 1, 5])
def test_features_append_an_axis_and_keep_the_dtype(shape: tuple[int, ...], num_bands: int) -> None:
    features = fourier_features(torch.zeros(shape, dtype=torch.float64), num_bands)
    assert features.shape == (*shape, 2 * num_bands)
    assert features.dtype == torch.float64


def test_lines_of_a_map_of_three_by_four_pixels_in_patches_of_two() -> None:
    # One band. Centres of 2 are -1/2 and 1/2: (sin, cos) = (-1, 0) and (1, 0), for patches and for pixels in a patch.
    rows, columns = position_lines(3, 4, 2, 1, dtype=torch.float64)
    absolute, relative = [-1.0, -1, 1, 1], [-1.0, 1, -1, 1]
    expected = [[absolute[i], 0, 0, 0, relative[i], 0, 0, 0] for i in range(3)]
    torch.testing.assert_close(rows, reference.float64(expected), rtol=0, atol=1e-15)
    expected = [[0, 0, absolute[i], 0, 0, 0, relative[i], 0] for i in range(4)]
    torch.testing.assert_close(columns, reference.float64(expected), rtol=0, atol=1e-15)


def test_lines_are_made_once_for_each_size_and_type_and_can_take_part_in_training() -> None:
    with torch.inference_mode():
        first = position_lines(31, 17, 3, 2)
    assert position_lines(31, 17, 3, 2)[0] is first[0]
    assert not first[0].is_inference()
    assert position_lines(31, 17, 3, 2, dtype=torch.float64)[0].dtype == torch.float64
    assert position_lines(30, 17, 3, 2)[0].shape == (30, 16)
    assert position_lines(31, 17, 3, 2, device=torch.device("meta"))[0].is_meta
    with FakeTensorMode():
        assert position_lines(31, 17, 3, 2)[0] is not first[0]


def test_position_map_layout_by_hand() -> None:
    """Channels: absolute row, absolute column, relative row, relative column, each sine then cosine."""
    # 1 x 2 patches of 2 x 2 pixels, one band. One row of patches: u = 0, (sin, cos) = (0, 1).
    # Two columns of patches: u = -+1/2, (-+1, 0). Two pixels a side: likewise.
    positions = position_map(1, 2, 2, 1, dtype=torch.float64)
    assert positions.shape == (1, 8, 2, 4)
    zeros, ones = [[0.0] * 4] * 2, [[1.0] * 4] * 2
    expected = [
        zeros,
        ones,
        [[-1, -1, 1, 1], [-1, -1, 1, 1]],
        zeros,
        [[-1, -1, -1, -1], [1, 1, 1, 1]],
        zeros,
        [[-1, 1, -1, 1], [-1, 1, -1, 1]],
        zeros,
    ]
    torch.testing.assert_close(positions[0], reference.float64(expected), rtol=0, atol=1e-15)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_position_map_equals_the_naive_loops(rows: int, columns: int, side: int, num_bands: int) -> None:
    nothing = torch.zeros(1, 0, rows * side, columns * side, dtype=torch.float64)
    patches = reference.enriched_patches(nothing, side, num_bands)
    where = reference.places(1, rows * side, columns * side, side)
    expected = reference.assemble(list(patches), where, (1, rows * side, columns * side), side)
    actual = position_map(rows, columns, side, num_bands, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
