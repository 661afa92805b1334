"""Colours, numbers and frames of the pictures; what the page says in words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pcenet.app.pictures import changed_picture, class_picture, expert_colour, expert_picture, opacity_of
from pcenet.app.session import LayerRouting
from pcenet.app.words import (
    change_report,
    class_table,
    expert_legend,
    headline,
    layer_title,
    notice,
    patch_answer,
    points,
)
from pcenet.reporting.numbers import share_text

CLASSES = ["zero", "one", "two"]
BLUE, ORANGE = (0, 0x72, 0xB2), (0xE6, 0x9F, 0x00)  # of classes 0 and 1
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


def test_frames_of_what_is_pointed_at_and_sent_elsewhere(explorer, corner):
    look = explorer("classify")
    visit = look.point_at(look.begin(corner), 1, 1)
    frame = np.asarray(expert_picture(visit))[330, 320:328]
    assert [tuple(pixel) for pixel in frame] == [(0,) * 3] * 3 + [(255,) * 3] * 3 + [(0,) * 3] * 2
    sent = replace(look.send(visit, 1), patch=None)
    assert tuple(np.asarray(expert_picture(sent))[330, 320]) == (255,) * 3
    elsewhere = look.show_layer(sent, "second")
    assert tuple(np.asarray(expert_picture(elsewhere))[330, 320]) != (255,) * 3


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
    assert "Click on a patch" in patch_answer(visit)
    # p(expert 0) of a dark patch in the first layer is 1 / (1 + exp(-0.4)).
    said = words_of(patch_answer(look.point_at(visit, 1, 0)))
    assert "Patch in row 1, column 0 of first ." in said
    assert "The router chose expert 0 , with gate value 0.599 ." in said
    assert "0 expert 0 (router's choice, serves it) 59.9 % 1 expert 1 40.1 %" in said
    said = words_of(patch_answer(look.send(look.point_at(visit, 1, 0), 1)))
    assert "You sent it to expert 1 . The router would have chosen expert 0 , with gate value 0.599." in said
    assert "0 expert 0 (router's choice) 59.9 % 1 expert 1 (serves it) 40.1 %" in said


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
    assert words_of(change_report(visit, CLASSES)).startswith("Nothing is changed yet.")
    assert words_of(headline(visit, CLASSES)) == f"zero , probability {share_text(visit.after.shares[0])}"
    visit = look.send(look.point_at(look.show_layer(visit, "second"), 0, 1), 1)
    visit = look.send(look.point_at(visit, 1, 0), 1)
    said = words_of(change_report(visit, CLASSES))
    assert "second, row 0, column 1: to expert 1 second, row 1, column 0: to expert 1" in said
    assert "The class changed from zero to one; the largest change is" in said
    assert "No other patch changed its expert." in said
    table = words_of(class_table(visit, CLASSES))
    assert table.startswith("Classes by their probability, with the router's choices and now class router now")
    first = look.send(look.point_at(look.begin(corner), 1, 0), 1)
    assert "1 patch of second went to another expert by themselves" in words_of(change_report(first, CLASSES))


def test_what_is_said_of_changed_pixels(explorer):
    look = explorer("segment")
    visit = look.send(look.point_at(look.show_layer(look.begin(Image.new("RGB", (8, 8))), "second"), 0, 0), 1)
    count = int((visit.after.mask == 1).sum())
    assert f"{count} of 409600 pixels ( {share_text(count / 409600)} )".replace(" ", "") in words_of(
        change_report(visit, CLASSES)
    ).replace(" ", "")
    assert "Mostly zero" in words_of(headline(visit, CLASSES))
    assert "two" not in words_of(headline(visit, CLASSES))  # of no pixel


def test_numbers_as_words(explorer, corner):
    assert [share_text(share) for share in (0, 0.1234, 1)] == ["0.0 %", "12.3 %", "100.0 %"]
    assert [points(value) for value in (0.0, 0.00004, 0.01, -0.5)] == ["0", "0", "+1.00", "-50.00"]
    routing = explorer("classify").begin(corner).routing
    layers = {f"stages.{number}.0.body": routing for number in range(5)}
    assert layer_title("stages.0.0.body", layers) == "1 of 5, early: 2 x 2 patches (stages.0.0)"
    places = [layer_title(name, layers).partition(":")[0] for name in layers]
    assert places == ["1 of 5, early", "2 of 5, early", "3 of 5, middle", "4 of 5, late", "5 of 5, late"]
    assert layer_title("a", {"a": routing}) == "1 of 1: 2 x 2 patches (a)"
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
        class_table(visit, [evil] * 3),
        change_report(visit, [evil] * 3),
        patch_answer(named),
        change_report(named, [evil] * 3),
    ):
        assert "<img" not in said
        assert "&lt;img" in said
    assert notice() == ""
    assert 'role="alert"' in notice("x")
