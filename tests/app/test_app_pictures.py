"""Colours, numbers and frames of the pictures; what the page says in words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pcenet.app.pictures import (
    changed_picture,
    class_picture,
    expert_colour,
    expert_picture,
    opacity_of,
    prediction_picture,
)
from pcenet.app.session import LayerRouting
from pcenet.app.words import (
    change_report,
    class_list,
    expert_choices,
    expert_legend,
    headline,
    layer_title,
    notice,
    patch_answer,
)
from pcenet.reporting.numbers import share_text

CLASSES = ["zero", "one", "two"]
BLUE, ORANGE, GREEN = (0, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0, 0x9E, 0x73)  # of classes 0, 1 and 2
LIME, INDIGO = (0xB4, 0xE6, 0x00), (0x33, 0x22, 0x88)  # of experts 0 and 1


def words_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).strip()


def test_opacity_is_the_gate_value():
    assert [opacity_of(gate) for gate in (0.0, 0.5, 1.0)] == pytest.approx([0.15, 0.45, 0.75])


def test_patches_have_their_experts_colours(explorer, corner):
    visit = explorer("classify").begin(corner)
    picture = np.asarray(expert_picture(visit)).astype(float)
    gate = visit.routing.gate
    # Away from the frame and the number: white under indigo, black under lime.
    light, dark = opacity_of(gate[0, 0]), opacity_of(gate[1, 1])
    np.testing.assert_allclose(picture[20, 20], [255 * (1 - light) + light * c for c in INDIGO], atol=1)
    np.testing.assert_allclose(picture[620, 620], [dark * c for c in LIME], atol=1)
    # The numbers are written in white, each in the middle of its patch.
    for row, column in np.ndindex(2, 2):
        middle = picture[320 * row + 150 : 320 * row + 170, 320 * column + 150 : 320 * column + 170]
        assert (middle == 255).all(axis=2).any()


def test_what_was_sent_elsewhere_has_a_white_frame(explorer, corner):
    look = explorer("classify")
    visit = look.point_at(look.begin(corner), 1, 1)
    assert tuple(np.asarray(expert_picture(visit))[330, 320]) == (40, 40, 40)  # the line between all patches
    sent = look.send(visit, 1)
    frame = np.asarray(expert_picture(sent))[330, 320:323]
    assert [tuple(pixel) for pixel in frame] == [(255,) * 3] * 2 + [(0,) * 3]
    elsewhere = look.show_layer(sent, "second")
    assert tuple(np.asarray(expert_picture(elsewhere))[330, 320]) == (40, 40, 40)


def test_the_views_of_a_prediction(explorer):
    """An image of which one pixel is truly of class 2 and one does not count; a move makes a corner class 1."""
    look = explorer("segment")
    truth = Image.new("L", (8, 8))
    truth.putpixel((7, 7), 2)
    truth.putpixel((6, 7), 255)
    visit = look.point_at(look.show_layer(look.begin(Image.new("RGB", (8, 8)), truth), "second"), 0, 0)
    visit = look.send(visit, 1)

    def colours(view: str, *places: tuple[int, int]) -> list[tuple[int, ...]]:
        picture = prediction_picture(replace(visit, view=view))
        return [picture.getpixel(place) for place in places]

    halves = {number: tuple(round(c / 2) for c in colour) for number, colour in enumerate((BLUE, ORANGE, GREEN))}
    corner, middle, ignored, last = (10, 10), (400, 400), (520, 600), (600, 600)  # of 640 x 640
    for view, expected in {
        "after": [halves[1], halves[0], halves[0], halves[0]],
        "before": [halves[0]] * 4,
        "truth": [halves[0], halves[0], (0, 0, 0), halves[2]],
        "image": [(0, 0, 0)] * 4,
        "change": [(0xD5, 0x5E, 0x00), (0, 0, 0), (0, 0, 0), (0, 0, 0)],
    }.items():
        found = colours(view, corner, middle, ignored, last)
        np.testing.assert_allclose(found, expected, atol=1, err_msg=view)
    classified = explorer("classify").begin(Image.new("RGB", (8, 8)), "one")
    assert prediction_picture(classified) is classified.image.picture


def test_how_right_a_prediction_is(explorer):
    """All of class 0 at first; of 63 pixels that count 62 are; in the end the pixels of class 1 are wrong, too."""
    look = explorer("segment")
    truth = Image.new("L", (8, 8))
    truth.putpixel((7, 7), 2)
    truth.putpixel((6, 7), 255)
    visit = look.begin(Image.new("RGB", (8, 8)), truth)
    assert visit.image.right(visit.before) == pytest.approx(62 / 63)
    assert words_of(headline(visit, CLASSES)) == "Prediction: 98.4 % of pixels right"
    moved = look.send(look.point_at(look.show_layer(visit, "second"), 0, 0), 1)
    wrong = (moved.after.mask == 1).sum() / 6400  # of 80 x 80 pixels each
    expected = (62 - wrong) / 63
    assert moved.image.right(moved.after) == pytest.approx(expected)
    assert words_of(headline(moved, CLASSES)) == f"Prediction: 98.4 % → {100 * expected:.1f} % of pixels right"
    nothing_counts = look.begin(Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255))
    assert nothing_counts.image.right(nothing_counts.before) is None
    assert words_of(headline(nothing_counts, CLASSES)) == "Prediction: zero 100.0 % of the pixels"


def test_a_dropped_patch_is_grey(explorer, corner):
    visit = explorer("classify").begin(corner)
    kept = visit.routing.dispatch_mask.copy()
    kept[1, 1] = False
    dropped = replace(visit.routing, dispatch_mask=kept)
    visit = replace(visit, after=replace(visit.after, layers={**visit.after.layers, "first": dropped}))
    pixel = np.asarray(expert_picture(visit))[620, 620]
    assert pixel[0] == pixel[1] == pixel[2] == round(128 * opacity_of(float(dropped.gate[1, 1])))
    assert "- dropped: 1 patch" in words_of(expert_legend(dropped))
    assert "Dropped for lack of capacity: 0." in words_of(patch_answer(replace(visit, patch=(1, 1))))


def test_more_experts_than_a_palette_has_colours():
    colours = [expert_colour(number) for number in range(20)]
    assert len(set(colours)) == 20
    assert expert_colour(-1) == (128, 128, 128)


def test_changed_pixels_and_classes():
    grey = Image.new("RGB", (9, 9), (100, 100, 100))
    changed = np.zeros((9, 9), dtype=bool)
    changed[4, 4] = True
    picture = np.asarray(changed_picture(grey, changed))
    assert (picture[3:6, 3:6] == (0xD5, 0x5E, 0x00)).all()
    assert (picture != 45).any(axis=2).sum() == 9  # 100 * 0.45, but for the pixel and its neighbours
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[0, 0] = 1
    classes = np.asarray(class_picture(grey, mask)).astype(float)
    np.testing.assert_allclose(classes[0, 0], [(100 + c) / 2 for c in ORANGE], atol=1)
    np.testing.assert_allclose(classes[8, 8], [(100 + c) / 2 for c in BLUE], atol=1)


def test_what_is_said_of_a_patch(explorer, corner):
    look = explorer("classify")
    visit = look.begin(corner)
    assert patch_answer(visit) == ""
    # p(expert 0) of a dark patch in the first layer is 1 / (1 + exp(-0.4)).
    pointed = look.point_at(visit, 1, 0)
    assert words_of(patch_answer(pointed)).startswith("Row 1, column 0: the router chose expert 0 , gate value 0.599 .")
    assert expert_choices(pointed) == [("expert 0: 59.9 %", 0), ("expert 1: 40.1 %", 1)]
    said = words_of(patch_answer(look.send(pointed, 1)))
    assert said.startswith("Row 1, column 0: you sent it to expert 1 , the router chose expert 0 , gate value 0.599.")


def test_the_frame_and_the_panel_are_at_the_patch(explorer, corner):
    look = explorer("classify")
    visit = look.begin(corner)  # 2 x 2 patches
    above = patch_answer(look.point_at(visit, 0, 1))
    assert "#experts::after{left:50.0%;top:0.0%;width:50.0%;height:50.0%}" in above
    assert "#panel{left:max(0px,min(50.0%,100% - var(--panel)));top:50.0%}" in above  # below it
    below = patch_answer(look.point_at(visit, 1, 0))
    assert "#experts::after{left:0.0%;top:50.0%;width:50.0%;height:50.0%}" in below
    assert "#panel{left:max(0px,min(0.0%,100% - var(--panel)));bottom:50.0%}" in below  # above it


def test_several_experts_and_other_factors(explorer, corner):
    visit = explorer("classify").begin(corner)
    routing = LayerRouting(
        probs=np.array([[[0.5, 0.25, 0.25]]], dtype=np.float32),
        expert_ids=np.array([[[0, 2]]]),
        weight=np.array([[[2 / 3, 1 / 3]]], dtype=np.float32),
        dispatch_mask=np.array([[[True, False]]]),
        reach=(1, 1),
    )
    visit = replace(visit, patch=(0, 0), after=replace(visit.after, layers={"first": routing}))
    said = words_of(patch_answer(visit))
    assert "It is served by experts 0, 2." in said
    assert "Dropped for lack of capacity: 2." in said
    assert "is not the gate value in this network but 0.667, 0.333." in said


def test_what_is_said_of_a_change(explorer, corner):
    look = explorer("classify")
    visit = look.begin(corner)
    assert words_of(change_report(visit, CLASSES)) == "Click on a patch, and send it to another expert."
    before = [share_text(share) for share in visit.before.shares]
    assert words_of(headline(visit, CLASSES)) == f"Prediction: zero , probability {before[0]}"
    known = look.begin(corner, "one")
    assert words_of(headline(known, CLASSES)).endswith("(true class: one)")
    assert words_of(class_list(visit, CLASSES)) == f"zero {before[0]} one {before[1]} two {before[2]}"
    visit = look.send(look.point_at(look.show_layer(visit, "second"), 0, 1), 1)
    said = words_of(change_report(visit, CLASSES))
    assert said.startswith("You moved 1 patch of second (row 0, column 1, to expert 1):")
    still = look.send(look.point_at(look.show_layer(look.begin(corner), "second"), 0, 0), 0)
    change = f"{still.before.shares[0]:.2%} → {still.after.shares[0]:.2%}"
    assert words_of(change_report(still, CLASSES)).endswith(f": still zero , probability {change}.")
    visit = look.send(look.point_at(visit, 1, 0), 1)
    said = words_of(change_report(visit, CLASSES))
    change = f"{visit.before.shares[1]:.2%} → {visit.after.shares[1]:.2%}"
    assert said == f"You moved 2 patches of second: zero became one , whose probability went {change}."
    after = [share_text(share) for share in visit.after.shares]
    assert f"one {before[1]} → {after[1]}" in words_of(class_list(visit, CLASSES))
    first = look.send(look.point_at(look.begin(corner), 1, 0), 1)
    said = words_of(change_report(first, CLASSES))
    assert said.endswith("The router then changed 1 patch of second by itself.")


def test_what_is_said_of_changed_pixels(explorer):
    look = explorer("segment")
    visit = look.send(look.point_at(look.show_layer(look.begin(Image.new("RGB", (8, 8))), "second"), 0, 0), 1)
    count = int((visit.after.mask == 1).sum())
    said = words_of(change_report(visit, CLASSES))
    assert f"{share_text(count / 409600)} of the pixels ({count}) changed their class." in said
    said = words_of(headline(visit, CLASSES))
    assert said.startswith("Prediction: zero ")
    assert "two" not in said  # of no pixel


def test_numbers_as_words(explorer, corner):
    assert [share_text(share) for share in (0, 0.1234, 1)] == ["0.0 %", "12.3 %", "100.0 %"]
    routing = explorer("classify").begin(corner).routing
    layers = {f"stages.{number}.0.body": routing for number in range(5)}
    assert layer_title("stages.0.0.body", layers) == "Layer 1 of 5, early: 2 x 2 patches (stages.0.0)"
    places = [layer_title(name, layers).partition(":")[0] for name in layers]
    parts = ["1 of 5, early", "2 of 5, early", "3 of 5, middle", "4 of 5, late", "5 of 5, late"]
    assert places == [f"Layer {part}" for part in parts]
    assert layer_title("a", {"a": routing}) == "Layer 1 of 1: 2 x 2 patches (a)"
    assert words_of(expert_legend(routing)) == "0 expert 0: 3 patches 1 expert 1: 1 patch"


def test_foreign_texts_are_escaped(explorer, corner):
    evil = "<img src=x onerror=alert(1)>"
    look = explorer("classify")
    visit = look.send(look.point_at(look.begin(corner), 0, 0), 0)
    layers = {evil: visit.routing}
    named = replace(
        visit,
        layer=evil,
        before=replace(visit.before, layers=layers),
        after=replace(visit.after, layers=layers),
        moves={visit.place._replace(layer=evil): 0},
    )
    for said in (
        notice(evil),
        headline(visit, [evil] * 3),
        headline(look.begin(corner, evil), CLASSES),
        class_list(visit, [evil] * 3),
        change_report(visit, [evil] * 3),
        change_report(named, [evil] * 3),
    ):
        assert "<img" not in said
        assert "&lt;img" in said
    assert notice() == ""
    assert 'role="alert"' in notice("x")
