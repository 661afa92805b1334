"""Mixup, cutmix, random erasing and accumulation: by hand, and in a run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from trainers import classifying

from pcenet.data import train_transform
from pcenet.runs.config import TrainConfig
from pcenet.tasks.mixing import make_mixing, make_pasting
from pcenet.tasks.segmentation import SegmentationObjective
from pcenet.training.loop import Trainer
from pcenet.training.run import train

Start = Callable[..., TrainConfig]


def batch() -> tuple[Tensor, Tensor]:
    """Three images, all of one value each: 0, 1, 2, which is their class as well."""
    labels = torch.arange(3)
    return labels.float().view(3, 1, 1, 1).expand(3, 3, 16, 16).clone(), F.one_hot(labels, 3).float()


def test_mixup_mixes_images_and_targets_by_one_share() -> None:
    images, targets = make_mixing(0.8, 0.0)(*batch())
    share = targets[0, 0].item()
    assert 0 < share < 1
    # Image i is share * i + (1 - share) * (the one before it).
    for i, before in ((0, 2), (1, 0), (2, 1)):
        assert torch.allclose(images[i], torch.tensor(share * i + (1 - share) * before), atol=1e-6)
        assert targets[i, i].item() == pytest.approx(share)
        assert targets[i, before].item() == pytest.approx(1 - share)


def test_cutmix_pastes_a_rectangle_and_weighs_by_area() -> None:
    torch.manual_seed(3)
    images, targets = make_mixing(0.0, 1.0)(*batch())
    for i, before in ((0, 2), (1, 0), (2, 1)):
        pasted = images[i, 0] == before
        assert torch.equal(pasted | (images[i, 0] == i), torch.ones(16, 16, dtype=torch.bool))
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        assert 0 < pasted.sum() < 256
        assert targets[i, before].item() == pytest.approx(pasted.float().mean().item())
        assert targets[i].sum().item() == pytest.approx(1)


def test_with_both_each_batch_gets_one_of_them() -> None:
    mixing = make_mixing(1.0, 1.0)
    plain = set()
    for seed in range(20):
        torch.manual_seed(seed)
        images, _ = mixing(*batch())
        plain.add(bool((images == images.round()).all()))  # cutmix makes no new values
    assert plain == {False, True}


def test_neither_is_nothing() -> None:
    assert make_mixing(0.0, 0.0) is None


def test_pixels_and_their_classes_are_pasted_together() -> None:
    """Image i has the value i everywhere, and the classes of its mask are 10 * i, but 255 in the last column."""
    torch.manual_seed(3)
    images, _ = batch()
    masks = (10 * torch.arange(3)).view(3, 1, 1).repeat(1, 16, 16)
    masks[:, :, 15] = 255
    mixed, numbers = make_pasting(1.0)(images, masks)
    assert mixed.shape == images.shape
    assert numbers.dtype == torch.int64
    assert torch.equal(numbers[:, :, 15], masks[:, :, 15])
    assert torch.equal(numbers[:, :, :15].float(), 10 * mixed[:, 0, :, :15])
    for i, before in ((0, 2), (1, 0), (2, 1)):
        pasted = mixed[i, 0] == before
        assert 0 < pasted.sum() < 256
        assert torch.equal(pasted | (mixed[i, 0] == i), torch.ones(16, 16, dtype=torch.bool))


def test_segmentation_is_trained_on_pasted_images() -> None:
    config = TrainConfig(task="segment", cutmix=1.0)
    masks = torch.arange(3).view(3, 1, 1).expand(3, 16, 16)
    torch.manual_seed(3)
    images, numbers = SegmentationObjective(config).mix(batch()[0], masks)
    assert torch.equal(numbers.float(), images[:, 0])
    assert not torch.equal(numbers, masks)
    same, as_they_were = SegmentationObjective(TrainConfig(task="segment")).mix(images, masks)
    assert same is images
    assert as_they_were is masks


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_loss_and_accuracy_are_of_the_mixed_targets(options: dict[str, float]) -> None:
    task = classifying(Means(), TrainConfig(label_smoothing=0.2, **options))
    seen: list[tuple[Tensor, Tensor]] = []
    mixing = task.objective.mixing
    task.objective.mixing = None  # a registered module is replaced by a plain function that remembers
    object.__setattr__(task.objective, "mixing", lambda *given: seen.append(mixing(*given)) or seen[-1])
    loss, noted = task.batch_loss((batch()[0], torch.arange(3)), 0)
    ((images, targets),) = seen
    smooth = 0.8 * targets + 0.2 / 3
    expected = -(smooth * Means()(images).log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    right = (Means()(images).argmax(1) == targets.argmax(1)).float().mean()
    assert noted.values["top1"].item() == pytest.approx(right.item())


class Means(torch.nn.Module):
    """Logits of three classes: minus the distance of an image's mean to 0, 1 and 2."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # an optimiser needs something

    def forward(self, images: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3))[:, None] - torch.arange(3)).abs()


def test_mixing_repeats_with_the_seed(start: Start) -> None:
    """Everything together, augmentations included; the second run loads its images in another process."""
    options: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.5, "augment": "randaugment"}
    first, again, plain = (
        train(start(name, epochs=1, **changes))
        for name, changes in (("a", options), ("b", options | {"workers": 1}), ("c", {}))
    )
    weights = [(run.model / "model.safetensors").read_bytes() for run in (first, again, plain)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("augment", ["auto", "none", "randaugment"])
def test_erasing_sets_a_rectangle_to_the_mean_colour(augment: Any) -> None:
    image = Image.fromarray(np.full((32, 32, 3), 255, dtype=np.uint8))  # normalised: 1 everywhere
    options: dict[str, Any] = {"augment": augment, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    erase = train_transform(32, random_erasing=1.0, **options)
    result = erase(image)
    erased = (result == 0).all(0)
    assert 0.01 < erased.float().mean() < 0.34  # 2 to 33 % of the area, to whole pixels
    if augment != "randaugment":  # which turns some images, and fills with black
        assert torch.equal(erased, erased.any(1)[:, None] & erased.any(0))
    torch.manual_seed(0)
    half = train_transform(32, random_erasing=0.5, **(options | {"augment": "none"}))
    count = sum((half(image) == 0).any().item() for _ in range(200))
    assert 70 < count < 130  # 100, give or take four deviations of 7


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match=f"random_erasing must be between 0 and 1, not {share}"):
        train_transform(32, random_erasing=share)


def test_what_is_left_over_makes_a_step(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of six batches of four: four for the first step, the two that are left over for the second."""
    seeds: list[int] = []
    monkeypatch.setattr(
        "pcenet.training.loop.step_seed", lambda seed, batch_number, rank: seeds.append(batch_number) or batch_number
    )
    folder = train(start(batch_size=4, accumulate=4))
    with open(folder.logs / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [2, 4]
    # Warm-up over the two steps of the first epoch; the last step of two after it begins at half of the cosine.
    assert [row["train/lr"] for row in rows] == pytest.approx([0.003, 0.003 * 0.5])
    assert len(seeds) == len(set(seeds)) == 12
    # Routers count every patch of every batch, whichever of them makes a step.
    for row in rows:
        assert sum(row[f"val_router/stages.1.1.body/load_{expert}"] for expert in range(4)) == pytest.approx(1)


def test_accumulated_gradients_are_the_mean_of_the_batches(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network without batch statistics and chance, two batches of four make the gradient of one of eight."""
    gradients: dict[str, Tensor] = {}
    original = Trainer.update

    def keep(self: Trainer, *arguments: Any) -> None:
        if not self.state.step:
            values = [parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None]
            gradients[str(self.config.accumulate)] = torch.cat(values).clone()
        original(self, *arguments)

    monkeypatch.setattr(Trainer, "update", keep)
    options: dict[str, Any] = {"model": "dense_nano", "clip_grad": 0.0, "epochs": 1}
    monkeypatch.setattr("torch.nn.BatchNorm2d.forward", lambda self, x: x)
    train(start("whole", batch_size=8, **options))
    train(start("halves", batch_size=4, accumulate=2, **options))
    torch.testing.assert_close(gradients["2"], gradients["1"], rtol=1e-4, atol=1e-6)
