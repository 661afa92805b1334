"""Overlays, pixel by pixel, and the words for places."""

from __future__ import annotations

import itertools
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pcenet.analysis import Seen
from pcenet.explanation.figures import class_map, from_figure, load_history, place_in_words, place_maps, short
from pcenet.explanation.overlays import DROPPED, FAINTEST, LIGHT, STRONGEST, class_overlay, expert_overlay
from pcenet.nn import Grid, route
from pcenet.reporting.colours import class_colours, expert_colours


def test_colour_is_the_expert_opacity_the_gate_value_and_dropped_is_dark() -> None:
    # Three patches side by side, of which expert 0, with room for one, drops the less sure.
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    seen = Seen(route(probs.log(), Grid(1, 1, 3), capacity_factor=0.5), 4, (4, 12))
    assert seen.routing.dispatch_mask.flatten().tolist() == [True, True, False]
    picture = np.asarray(expert_overlay(torch.zeros(3, 4, 12), seen, 0), float)  # over black
    below = round(255 * (1 - LIGHT))
    height, width = picture.shape[:2]
    assert width == 400
    for patch, (expert, gate) in enumerate([(0, 0.9), (1, 0.8)]):
        opacity = FAINTEST + (STRONGEST - FAINTEST) * gate
        expected = [opacity * channel + (1 - opacity) * below for channel in expert_colours()[expert]]
        np.testing.assert_allclose(picture[height // 2, width * (2 * patch + 1) // 6], expected, atol=2)
    dark = [STRONGEST * channel + (1 - STRONGEST) * below for channel in DROPPED]
    np.testing.assert_allclose(picture[height // 4, width * 5 // 6], dark, atol=2)
    np.testing.assert_allclose(picture[height // 2, width * 5 // 6], 255, atol=2)  # the cross


def test_the_number_of_the_expert_is_written_into_its_patch() -> None:
    def patch(expert: int) -> np.ndarray:
        logits = torch.nn.functional.one_hot(torch.tensor([expert]), 9).float()
        seen = Seen(route(logits, Grid(1, 1, 1)), 4, (4, 4))
        return np.asarray(expert_overlay(torch.zeros(3, 4, 4), seen, 0))[4:22, 3:20]

    written = [(patch(expert) > 200).all(2) for expert in (0, 1)]
    assert all(mask.sum() > 5 for mask in written)
    assert (written[0] != written[1]).any()


def test_pixels_without_a_class_stay_as_they_are() -> None:
    pixels = torch.full((3, 1, 2), 0.5)
    picture = np.asarray(class_overlay(pixels, torch.tensor([[1, 255]]), opacity=1.0))
    assert picture[50, 100].tolist() == list(class_colours()[1])
    assert picture[50, 300].tolist() == [127, 127, 127]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([[1, 0], [0, 0]], "at the upper left"),
        ([[0, 0], [0, 1]], "at the lower right"),
        ([[1, 1], [0, 0]], "at the top"),
        ([[0, 1], [0, 1]], "at the right"),
        ([[1, 1], [1, 1]], "all over"),
        ([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], "in the middle"),
        ([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], "all over"),
        ([[0, 0], [0, 0]], "nowhere"),
    ],
)
def test_places_in_words(weights: list[list[int]], words: str) -> None:
    assert place_in_words(weights) == words


def test_names_are_no_formulas_and_not_too_long() -> None:
    assert short("$x_{$") == r"\$x_{\$"
    assert short("n" * 30) == "n" * 19 + "..."


def test_of_many_classes_those_that_differ_most() -> None:
    counts = {f"class {number}": [50, 50] for number in range(40)} | {"odd": [100, 0], "none": [0, 0]}
    picture = class_map({"title": "a", "experts": 2, "by_class": counts})
    assert picture is not None
    assert picture.alt.count(": expert") == 30
    assert "odd: expert 0 100.0 %" in picture.alt
    assert "none" not in picture.alt


def test_a_script_without_glyphs_is_no_error() -> None:
    figure = Figure()
    figure.text(0, 0, "\u6f22\u5b57")
    assert from_figure("name", "alt", figure).png.startswith(b"\x89PNG")


def test_many_experts_have_room_and_colours_of_their_own() -> None:
    layer = {"title": "a", "name": "a", "experts": 12, "grid": [2, 3], "by_place": [[1] * 6] * 12}
    picture = place_maps(layer)
    assert "Expert 11: from 8.3 % to 8.3 %, most all over." in picture.alt
    assert picture.size[0] == 720
    row = {"epoch": 1.0} | {f"val_router/a/load_{expert}": 1 / 12 for expert in range(12)}
    history = load_history(layer, [row, row | {"epoch": 2.0}])
    with Image.open(BytesIO(history.png)) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}
    assert set(expert_colours()[:12]) <= colours


def test_experts_and_classes_share_no_colour() -> None:
    """The first dozen of each are a third of the range apart; a reader would see an agreement that is not there."""
    apart = [math.dist(a, b) for a in expert_colours()[:7] for b in class_colours()[:12]]
    assert min(apart) > 80
    among = [math.dist(a, b) for a, b in itertools.combinations(expert_colours()[:7], 2)]
    assert min(among) > 80
    assert len(set(expert_colours())) == 256
