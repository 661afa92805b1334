"""Galleries of patches whose gate values are known."""

from __future__ import annotations

import numpy as np
import torch

from pcenet.analysis import Gallery, Seen
from pcenet.analysis.galleries import GREY, SIDE, framed
from pcenet.nn import Grid, route


def seen(gates: list[tuple[int, float]], grid: Grid, **options: float) -> Seen:
    """Two experts; each patch's expert and gate value."""
    probs = torch.tensor([[gate, 1 - gate] if expert == 0 else [1 - gate, gate] for expert, gate in gates])
    return Seen(route(probs.log(), grid, **options), 4, (grid.rows * 4, grid.columns * 4))


def places(gallery: Gallery, expert: int) -> list[tuple[int, int, int]]:
    return [(each.image, each.row, each.column) for each in gallery.of(expert)]


def test_the_surest_patch_of_each_image_and_the_surest_images() -> None:
    gallery = Gallery(2, size=2)
    pixels = torch.rand(2, 3, 4, 8)
    # Image 0: expert 0 with 0.6 and 0.9, image 1: expert 1 with 0.8, expert 0 with 0.7.
    gallery.update(seen([(0, 0.6), (0, 0.9), (1, 0.8), (0, 0.7)], Grid(2, 1, 2)), pixels, first=0)
    assert places(gallery, 0) == [(0, 0, 1), (1, 0, 1)]
    # Image 2: expert 0 with 0.8 pushes image 1 out; image 3: expert 1 with 0.75 and 0.95.
    gallery.update(seen([(0, 0.8), (0, 0.55), (1, 0.75), (1, 0.95)], Grid(2, 1, 2)), pixels, first=2)
    assert places(gallery, 0) == [(0, 0, 1), (2, 0, 0)]
    assert places(gallery, 1) == [(3, 0, 1), (1, 0, 0)]
    np.testing.assert_allclose([each.gate for each in gallery.of(1)], [0.95, 0.8], atol=1e-6)


def test_of_equal_gate_values_the_first() -> None:
    gallery = Gallery(2, size=1)
    for first in (0, 1):
        gallery.update(seen([(0, 0.75), (0, 0.75)], Grid(1, 2, 1)), torch.rand(1, 3, 8, 4), first=first)
    assert places(gallery, 0) == [(0, 0, 0)]
    assert gallery.of(1) == []


def test_dropped_patches_are_not_shown() -> None:
    gallery = Gallery(2, size=4)
    # Capacity 1: of the two patches of expert 0 the surer one is served.
    gallery.update(seen([(0, 0.6), (0, 0.9)], Grid(2, 1, 1), capacity_factor=1.0), torch.rand(2, 3, 4, 4), first=0)
    assert places(gallery, 0) == [(1, 0, 0)]


def test_a_patch_stands_in_the_middle_with_grey_beyond_the_image() -> None:
    pixels = torch.zeros(3, 8, 8)
    pixels[0, :4, :4] = 1  # the patch is red, the rest black
    picture = np.asarray(framed(pixels, (0, 0, 4, 4)))
    assert picture.shape == (SIDE, SIDE, 3)
    quarter, half = SIDE // 4, SIDE // 2
    assert picture[half, half].tolist() == [255, 0, 0]
    assert picture[quarter // 2, half].tolist() == list(GREY)
    assert picture[half, quarter // 2].tolist() == list(GREY)
    assert picture[SIDE - 3, half].tolist() == [0, 0, 0]
    assert picture[quarter, half].tolist() == [255, 255, 255]  # its frame
