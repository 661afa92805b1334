"""What interventions cost, on counts made by hand and against the tasks' own measures."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcenet.analysis.effects import Intervention, Tally, effect, score, standard_interventions, tallies, tally
from pcenet.nn import PCELayer
from pcenet.tasks.pixels import PixelScores


def counts(hits: list[list[int]], out_of: list[list[int]]) -> Tally:
    return Tally(np.array(hits), np.array(out_of))


def test_labels_by_hand() -> None:
    found = tally(torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.2, 0.8]]), torch.tensor([1, 1, 2]), 3)
    assert found.out_of.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert found.hits.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert score("classify", found.hits.sum(0), found.out_of.sum(0)) == pytest.approx(2 / 3)


def test_masks_by_hand() -> None:
    # Predicted 0 0 1 1; the last pixel does not count. Class 0: intersection 1, union 2; class 1: 1 and 2.
    logits = nn.functional.one_hot(torch.tensor([[0, 0, 1, 1]]), 3).permute(2, 0, 1)[None].float()
    found = tally(logits, [torch.tensor([[0, 1, 1, 255]])], 3)
    assert found.hits.tolist() == [[1, 1, 0]]
    assert found.out_of.tolist() == [[2, 2, 0]]
    assert score("segment", found.hits.sum(0), found.out_of.sum(0)) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert score("segment", np.zeros(3, int), np.zeros(3, int)) == 0


def test_the_mean_iou_is_that_of_pcenet_eval() -> None:
    logits = torch.randn(3, 4, 6, 8)
    masks = [torch.randint(0, 4, (12, 16)), torch.randint(0, 3, (6, 8)), torch.full((5, 5), 255)]
    scores = PixelScores(4, torch.device("cpu"))
    scores.update(logits, masks)
    found = tally(logits, masks, 4)
    expected = scores.compute()
    assert score("segment", found.hits.sum(0), found.out_of.sum(0)) == pytest.approx(expected.miou, abs=1e-6)


def test_an_effect_by_hand() -> None:
    # Four images of two classes; before, three right, after, two: one lost, in class 1.
    base = counts([[1, 0], [1, 0], [0, 1], [0, 0]], [[1, 0], [1, 0], [0, 1], [0, 1]])
    changed = counts([[1, 0], [1, 0], [0, 0], [0, 0]], [[1, 0], [1, 0], [0, 1], [0, 1]])
    found = effect("classify", base, changed, resamples=4000)
    assert found.score == pytest.approx(2 / 4)
    assert found.difference == pytest.approx(-1 / 4)
    assert found.by_class.tolist() == [0, -1 / 2]
    # Of four draws, X ~ Bin(4, 1/4) hit the lost image, and the difference is -X / 4: P(X = 0) = 0.316,
    # P(X <= 2) = 0.949, P(X <= 3) = 0.996. So the percentiles 2.5 and 97.5 are -3/4 and 0.
    assert (found.low, found.high) == (-3 / 4, 0)


def test_an_interval_is_of_the_paired_difference() -> None:
    # The same image in every pair goes wrong or right in both: no difference, whatever is drawn.
    right = [[1]] * 5 + [[0]] * 5
    found = effect("classify", counts(right, [[1]] * 10), counts(right, [[1]] * 10))
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_a_class_without_images_has_no_difference() -> None:
    found = effect("segment", counts([[3, 0]], [[4, 0]]), counts([[2, 0]], [[5, 0]]))
    assert found.by_class[0] == pytest.approx(2 / 5 - 3 / 4)
    assert math.isnan(found.by_class[1])
    assert found.difference == pytest.approx(2 / 5 - 3 / 4)


class Constant(nn.Module):
    """Says the same class of every image."""

    answer = 0

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.answer), 3).float()


def test_every_intervention_sees_every_image_and_is_undone() -> None:
    model = Constant()

    def say(answer: int) -> Intervention:
        @contextmanager
        def change(network):
            network.answer, before = answer, network.answer
            yield
            network.answer = before

        return Intervention(f"say {answer}", change)

    labels = torch.tensor([0, 1, 1, 2, 0])
    batches = [(torch.zeros(2, 3, 1, 1), labels[:2]), (torch.zeros(3, 3, 1, 1), labels[2:])]
    base, (one, two) = tallies(model, batches, [say(1), say(2)], 3)
    for found, answer in ((base, 0), (one, 1), (two, 2)):
        assert found.out_of.tolist() == nn.functional.one_hot(labels, 3).tolist()
        assert found.hits.sum(1).tolist() == [int(label == answer) for label in labels.tolist()]


def names(model: nn.Module) -> list[tuple[str, str | None, int | None]]:
    return [(each.name, each.layer, each.expert) for each in standard_interventions(model)]


def test_the_standard_ones() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2, num_experts=2), PCELayer(3, 3, patch_size=2, num_experts=3))
    assert names(model) == [
        ("random expert", None, None),
        ("second choice", None, None),
        ("one expert for all", None, 0),
        ("one expert for all", None, 1),
        ("positions shuffled", None, None),
        ("positions removed", None, None),
        ("random expert", "0", None),
        ("knocked out", "0", 0),
        ("knocked out", "0", 1),
        ("random expert", "1", None),
        ("knocked out", "1", 0),
        ("knocked out", "1", 1),
        ("knocked out", "1", 2),
    ]


def test_what_a_network_does_not_allow_is_left_out() -> None:
    model = nn.Sequential(PCELayer(3, 3, patch_size=2, num_experts=1, num_bands=0))
    assert names(model) == [
        ("random expert", None, None),
        ("one expert for all", None, 0),
        ("random expert", "0", None),
    ]


@torch.no_grad()
def test_the_standard_ones_do_what_they_say_and_leave_the_network_as_it_was() -> None:
    # Experts that give constants: the output of a patch names its expert.
    model = nn.Sequential(PCELayer(3, 3, patch_size=2, num_experts=3, gate="straight_through", shortcut=False)).eval()
    layer = model[0]
    layer.experts.norm2.weight.zero_()
    layer.experts.norm2.bias.copy_(torch.arange(3.0)[:, None].expand(3, 3))
    x = torch.randn(2, 3, 8, 8)

    def served() -> Tensor:
        return model(x)[:, 0, ::2, ::2].flatten().round().long()

    routing = layer.router(x)
    own, rank = routing.expert_ids[:, 0], routing.logits.argsort(1, descending=True)
    assert torch.equal(served(), own)
    for each in standard_interventions(model):
        with each.change(model):
            found = served()
        if each.name == "one expert for all":
            assert found.unique().tolist() == [each.expert]
        elif each.name == "second choice":
            assert torch.equal(found, rank[:, 1])
        elif each.name == "knocked out":
            assert torch.equal(found, torch.where(own == each.expert, rank[:, 1], own))
        assert torch.equal(served(), own), each.name
