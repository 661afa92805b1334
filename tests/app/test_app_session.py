"""What a visitor sees, worked out by hand for networks of constant experts."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.app.session import REMEMBERED, LayerRouting, Place, change, fitted, map_sizes, sent_to
from pcenet.models import create_network
from pcenet.nn import Grid, Routing, record_routing


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


# Black and white patches in the first layer: the better expert's logit is so far above the other's.
DARK, LIGHT = sigmoid(0.4 - gelu(0)), sigmoid(gelu(1) - 0.4)
# In the second a patch has no red, or as much as the first layer's gate value.
NO_RED, RED = sigmoid(0.2 - gelu(0)), sigmoid(gelu(LIGHT) - 0.2)
SENT_RED = sigmoid(gelu(DARK) - 0.2)  # a dark patch that was sent to expert 1 keeps its own gate value


def softmax(*votes: float) -> list[float]:
    powers = [math.exp(vote) for vote in votes]
    return [power / sum(powers) for power in powers]


def test_an_image_is_routed_as_worked_out(explorer, corner):
    visit = explorer("classify").begin(corner)
    assert visit.layer == "first"
    first, second = visit.before.layers["first"], visit.before.layers["second"]
    assert first.serving.tolist() == second.serving.tolist() == [[1, 0], [0, 0]]
    np.testing.assert_allclose(first.gate, [[LIGHT, DARK], [DARK, DARK]], atol=1e-6)
    np.testing.assert_allclose(first.probs[0, 0], [1 - LIGHT, LIGHT], atol=1e-6)
    np.testing.assert_allclose(second.gate, [[RED, NO_RED], [NO_RED, NO_RED]], atol=1e-6)
    np.testing.assert_allclose(visit.before.shares, softmax(3 * NO_RED / 4, RED / 4, 0), atol=1e-6)
    assert visit.before is visit.after
    assert visit.before.mask is None


def test_a_patch_sent_elsewhere_changes_the_prediction_and_what_follows(explorer, corner):
    look = explorer("classify")
    visit = look.send(look.point_at(look.begin(corner), 1, 0), 1)
    assert visit.moves == {Place("first", 1, 0): 1}
    assert visit.routing.serving.tolist() == [[1, 0], [1, 0]]
    assert visit.routing.preferred.tolist() == [[1, 0], [0, 0]]
    np.testing.assert_allclose(visit.after.shares, softmax(2 * NO_RED / 4, (RED + SENT_RED) / 4, 0), atol=1e-6)
    found = change(visit)
    np.testing.assert_allclose(found.points, visit.after.shares - visit.before.shares)
    assert found.followers == {"second": 1}  # nobody sent the second layer's patch anywhere
    assert found.pixels is None
    # In the second layer the same patch can be sent back, and both hold.
    again = look.send(look.point_at(look.show_layer(visit, "second"), 1, 0), 0)
    assert again.moves == {Place("first", 1, 0): 1, Place("second", 1, 0): 0}
    np.testing.assert_allclose(again.after.shares, softmax((2 * NO_RED + SENT_RED) / 4, RED / 4, 0), atol=1e-6)
    assert change(again).followers == {}
    assert look.reset(again).after is look.reset(again).before
    assert look.reset(again).moves == {}


def test_sending_a_patch_where_it_went_anyway_undoes_a_move(explorer, corner):
    look = explorer("classify")
    visit = look.point_at(look.begin(corner), 0, 1)
    assert look.send(visit, 0).moves == {}
    back = look.send(look.send(visit, 1), 0)
    assert back.moves == {}
    assert back.after is back.before


def test_pixels_that_change_their_class(explorer):
    look = explorer("segment")
    visit = look.begin(Image.new("RGB", (8, 8)))
    assert visit.image.picture.size == (640, 640)
    assert visit.before.mask.shape == (640, 640)
    assert not visit.before.mask.any()
    assert visit.before.shares.tolist() == [1, 0, 0]
    visit = look.send(look.point_at(look.show_layer(visit, "second"), 0, 0), 1)
    # All votes have one gate value. Enlarged from 8 to 640 pixels, those for class 1 fall from 1 to 0 between the
    # centres of the map's fourth and fifth pixel, 280 and 360; class 1 wins where the product over both axes is above
    # a half.
    centres = np.arange(640) + 0.5
    votes = np.clip((360 - centres) / 80, 0, 1)
    expected = np.outer(votes, votes) > 0.5
    assert (change(visit).pixels == expected).all()
    assert (visit.after.mask == expected).all()
    np.testing.assert_allclose(visit.after.shares, [1 - expected.mean(), expected.mean(), 0], atol=1e-6)


def layer(rows: int, columns: int, reach: tuple[float, float]) -> LayerRouting:
    ones = np.ones((rows, columns, 1))
    return LayerRouting(ones.astype(np.float32), ones.astype(int) - 1, ones.astype(np.float32), ones > 0, reach)


def test_where_patches_lie_when_their_map_was_padded():
    # A map of 8 x 6 pixels in patches of 4: two columns reach over 8/6 of its width.
    found = layer(2, 2, (1.0, 8 / 6))
    size = (60, 80)
    assert [found.box(row, column, size) for row in (0, 1) for column in (0, 1)] == [
        (0, 0, 40, 40), (40, 0, 60, 40), (0, 40, 40, 80), (40, 40, 60, 80),
    ]  # fmt: skip
    assert found.patch_at(39.9, 39.9, size) == (0, 0)
    assert found.patch_at(40.1, 40.1, size) == (1, 1)
    assert found.patch_at(-5, 500, size) == (1, 0)
    assert found.patch_at(1e9, -1e9, size) == (0, 1)


def test_the_reach_of_a_padded_layer(explorer):
    # 24 x 16 pixels are brought to 12 x 8: three columns of patches; 20 x 16 to 10 x 8: three, over 12 / 10 of it.
    look = explorer("segment")
    assert look.begin(Image.new("RGB", (24, 16))).routing.reach == (1, 1)
    found = look.begin(Image.new("RGB", (20, 16))).routing
    assert found.grid == (2, 3)
    assert found.reach == (1, 1.2)


def test_of_several_experts_the_first_is_exchanged():
    choice = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 1]])
    routing = Routing(
        logits=torch.zeros(4, 3),
        probs=torch.full((4, 3), 1 / 3),
        expert_ids=choice,
        gates=torch.full((4, 2), 0.5),
        dispatch_mask=torch.ones(4, 2, dtype=torch.bool),
        capacity=None,
        grid=Grid(1, 2, 2),
    )
    moves = {Place("a", 0, 0): 2, Place("a", 1, 0): 2, Place("b", 0, 1): 1}
    assert sent_to(moves)("a", routing).tolist() == [[2, 1], [2, 0], [2, 1], [0, 1]]
    assert choice.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]  # the network's own record stays


def test_a_whole_expert_elsewhere_and_undone(explorer, corner):
    look = explorer("classify")
    visit = look.point_at(look.begin(corner), 1, 0)  # of expert 0, as two others
    sent = look.send(visit, 1, whole=True)
    assert sent.routing.serving.tolist() == [[1, 1], [1, 1]]
    assert sent.moves == {Place("first", *patch): 1 for patch in ((0, 1), (1, 0), (1, 1))}
    np.testing.assert_allclose(sent.after.shares, softmax(0, (RED + 3 * SENT_RED) / 4, 0), atol=1e-6)
    one_back = look.send(sent, 0)
    assert one_back.moves == {Place("first", *patch): 1 for patch in ((0, 1), (1, 1))}
    once = look.undo(one_back)
    assert once.moves == sent.moves
    np.testing.assert_array_equal(once.after.shares, sent.after.shares)
    twice = look.undo(once)
    assert (twice.moves, twice.past) == ({}, ())
    assert twice.after is twice.before
    assert look.undo(twice) is twice
    assert look.undo(look.reset(one_back)).moves == one_back.moves
    assert look.send(visit, 0).past == ()  # nothing has changed


def test_so_many_moves_can_be_undone(explorer, corner):
    look = explorer("classify")
    visit = look.point_at(look.begin(corner), 0, 1)
    for number in range(REMEMBERED + 3):
        visit = look.send(visit, (number + 1) % 2)
    assert len(visit.past) == REMEMBERED


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda look, visit: look.show_layer(visit, "third"), "layer 'third' is not one of first, second"),
        (lambda look, visit: look.point_at(visit, 2, 0), "row 2 must be a whole number from 0 to 1"),
        (lambda look, visit: look.point_at(visit, 0, -1), "column -1 must be a whole number from 0 to 1"),
        (lambda look, visit: look.send(visit, 1), "no patch is pointed at; point at one first"),
        (lambda look, visit: look.send(look.point_at(visit, 0, 0), 2), "expert 2 must be a whole number from 0 to 1"),
    ],
)
def test_what_there_is_not(explorer, corner, act, message):
    look = explorer("classify")
    with pytest.raises(ValueError, match=message):
        act(look, look.begin(corner))


def test_outputs_that_are_not_finite(explorer, corner):
    look = explorer("classify")
    with torch.no_grad():
        look.model.second.experts.conv2.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="outputs are not finite"):
        look.begin(corner)


def test_a_dense_network_has_nothing_to_show(explorer):
    from pcenet.app.session import Explorer

    with pytest.raises(ValueError, match="dense_nano has no PCE layer"):
        Explorer(create_network("dense_nano"), [], device=torch.device("cpu"))


def test_visitors_do_not_see_each_others_moves(explorer, corner):
    look = explorer("classify")
    visit = look.begin(corner)
    expected = [look.send(look.point_at(visit, 1, 0), 1), look.send(look.point_at(visit, 0, 0), 0), visit]
    together = threading.Barrier(6)

    def ask(number: int) -> list[np.ndarray]:
        together.wait(timeout=60)
        moves = expected[number % 3].moves
        return [look.look(visit.image, moves).shares for _ in range(20)]

    with ThreadPoolExecutor(6) as pool:
        for number, answers in enumerate(pool.map(ask, range(6))):
            assert all((shares == expected[number % 3].after.shares).all() for shares in answers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in look.model.modules())


def test_sizes_of_maps_are_noted_by_layer(explorer):
    model = explorer("classify").model
    with map_sizes(model) as sizes, record_routing(model):
        model(torch.zeros(1, 3, 8, 12))
    assert sizes == {"first": (8, 12), "second": (8, 12)}


def test_pictures_fit_the_page():
    assert fitted(Image.new("RGB", (32, 24)), 640).size == (640, 480)
    assert fitted(Image.new("RGB", (300, 100)), 640).size == (600, 200)  # whole pixels: twice
    assert fitted(Image.new("RGB", (480, 360)), 640).size == (640, 480)
    assert fitted(Image.new("RGB", (1280, 10)), 640).size == (640, 5)
    checked = Image.new("L", (2, 1))
    checked.putpixel((1, 0), 255)
    assert np.asarray(fitted(checked, 8)).tolist() == [[0, 0, 0, 0, 255, 255, 255, 255]] * 4


def test_a_classifier_shows_what_it_sees(explorer):
    # 16 x 8, left white: the middle 8 x 8 are seen, whose left half is white.
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    seen = np.asarray(explorer("classify").prepare(image).picture)
    assert seen.shape == (640, 640, 3)
    assert (seen[:, :320] == 255).all()
    assert (seen[:, 320:] == 0).all()


def test_a_layer_tells_by_what_its_place_does_not(explorer, corner) -> None:
    """Rows of one expert each tell nothing; two experts by turns in a row tell log 2, times how sure the router is."""
    routing = explorer("classify").begin(corner).routing
    probs = np.full((2, 2, 2), 0.5, np.float32)
    by_row = np.array([[[0], [0]], [[1], [1]]])
    assert replace(routing, probs=probs, expert_ids=by_row).tells == 0
    by_turns = np.array([[[0], [1]], [[1], [0]]])
    kept = np.ones((2, 2, 1), bool)
    found = replace(routing, probs=probs, expert_ids=by_turns, dispatch_mask=kept).tells
    assert found == pytest.approx(0.5 * np.log(2))
