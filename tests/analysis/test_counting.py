"""Counts on maps small enough to draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pcenet.analysis import PatchCounts, count_experts, patch_classes
from pcenet.nn import Grid, PCELayer, Routing, record_routing, route


def routing_to(choice: list[int], grid: Grid, num_experts: int = 2) -> Routing:
    return route(nn.functional.one_hot(torch.tensor(choice), num_experts).float(), grid)


def test_counts_by_position_expert_and_class() -> None:
    counts = PatchCounts(3)
    # two images of 1 x 2 patches; the second image's second patch does not count
    counts.update(routing_to([0, 1, 0, 0], Grid(2, 1, 2)), torch.tensor([2, 0, 2, 255]))
    counts.update(routing_to([1, 1], Grid(1, 1, 2)), torch.tensor([1, 0]))
    expected = np.zeros((2, 2, 3), int)
    expected[0, 0, 2] = 2
    expected[1, 1, 0] = 2
    expected[0, 1, 1] = 1
    np.testing.assert_array_equal(counts.compute(), expected)


def test_grids_of_other_sizes_are_kept_apart() -> None:
    counts = PatchCounts(1)
    counts.update(routing_to([0, 1], Grid(1, 1, 2)), torch.zeros(2, dtype=torch.long))
    counts.update(routing_to([1], Grid(1, 1, 1)), torch.zeros(1, dtype=torch.long))
    assert counts.compute()[:, :, 0].tolist() == [[1, 0], [0, 1], [0, 1]]


def test_nothing_counted() -> None:
    with pytest.raises(ValueError, match="no patch was counted"):
        PatchCounts(2).compute()


def test_the_class_of_most_pixels() -> None:
    # A map of 2 x 3 in patches of 2: the second column of patches is half padding. The mask has twice the map's side.
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 2, 255],
            [0, 1, 1, 1, 255, 255],
            [0, 0, 1, 1, 255, 255],
            [0, 0, 1, 0, 1, 2],
        ]
    )
    # Left patch: columns 0 to 3: eight 0 and eight 1 (a tie, so the first); right: two 2 and one 1.
    assert patch_classes(mask, (1, 2), patch_size=2, map_size=(2, 3), num_classes=3).tolist() == [0, 2]
    ignored = torch.full_like(mask, 255)
    assert patch_classes(ignored, (1, 2), patch_size=2, map_size=(2, 3), num_classes=3).tolist() == [255, 255]


def test_a_network_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PCELayer(3, 3, patch_size=4, num_experts=2))
    images = torch.randn(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 1, 0])
    model.eval()
    with torch.no_grad(), record_routing(model) as records:
        model(images)
    expert = records["0"][0].expert_ids[:, 0].view(4, 4)
    expected = np.zeros((4, 2, 2), int)
    for image in range(4):
        for cell in range(4):
            expected[cell, expert[image, cell], labels[image]] += 1
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    np.testing.assert_array_equal(count_experts(model, batches, 2)["0"].compute(), expected)
    masks = [(x, [label.expand(8 + i, 16) for i, label in enumerate(y)]) for x, y in batches]  # of any size
    np.testing.assert_array_equal(count_experts(model, masks, 2)["0"].compute(), expected)
