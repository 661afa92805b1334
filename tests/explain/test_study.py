"""One pass over the data: the same whatever the batches, and nothing of them is kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pcenet.analysis.agreement import Pixels
from pcenet.explanation.study import Study, study
from pcenet.nn import PCELayer

PIXELS = Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(PCELayer(3, 3, patch_size=2, num_experts=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return body.double().eval()


def run(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> Study:
    batches = zip(images.split(size), labels.split(size), strict=True)
    return study(model, batches, 3, PIXELS, lambda network, inputs: network(inputs))


def test_the_batches_do_not_matter() -> None:
    images, labels = torch.rand(7, 3, 4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0, 1])
    model = network()
    whole, parts = run(model, images, labels, 7), run(model, images, labels, 3)
    assert whole.images == parts.images == 7
    assert whole.tally.hits.tolist() == parts.tally.hits.tolist()
    assert whole.tally.out_of.tolist() == nn.functional.one_hot(labels, 3).tolist()
    one, other = whole.layers["0"], parts.layers["0"]
    assert one.health.compute() == other.health.compute()
    assert one.sharpness.compute().gate == pytest.approx(other.sharpness.compute().gate)
    assert one.by_class.compute().tolist() == other.by_class.compute().tolist()
    assert int(one.by_class.compute().sum()) == 7 * 6
    assert set(one.agreement) == {"other colours", "mirrored"}
    assert {name: each.compute() for name, each in one.agreement.items()} == {
        name: each.compute() for name, each in other.agreement.items()
    }
    for expert in range(3):
        exhibits, others = one.gallery.of(expert), other.gallery.of(expert)
        assert [(each.image, each.row, each.column) for each in exhibits] == [
            (each.image, each.row, each.column) for each in others
        ]


def test_no_image_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            assert sum(reference() is not None for reference in alive) <= 1
            images = torch.rand(2, 3, 4, 6, dtype=torch.float64)
            alive.append(weakref.ref(images))
            yield images, torch.tensor([0, 1])
            del images

    found = study(network(), batches(), 3, PIXELS, lambda network, inputs: network(inputs))
    assert found.images == 10
    assert sum(reference() is not None for reference in alive) == 0
