"""Pictures of the images of a run: what training sees, what the network makes of others, and that they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from pcenet.data import build_loader, build_segmentation_loader, eval_transform, open_segmentation_source, open_source
from pcenet.data.segment_transforms import segment_eval_transform
from pcenet.models import create_network
from pcenet.reporting.colours import class_colours
from pcenet.runs.config import TrainConfig
from pcenet.training.run import draw, train
from pcenet.training.sheets import prediction_sheet, seen, training_sheet

Start = Callable[..., TrainConfig]


class Constant(nn.Module):
    """Logits that are the same for every image, and the preprocessing of a network."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.pretrained_cfg = create_network("dense_nano").pretrained_cfg
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), *self.logits.shape)


def shown(axis: Any) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


@pytest.fixture
def classified(pictures: Path) -> Any:
    """What the sheets need of a run on the pictures, which are not augmented."""
    sources = {split: open_source(pictures, split) for split in ("train", "val")}
    loaders = {
        split: build_loader(source, eval_transform(32), batch_size=8, train=split == "train")
        for split, source in sources.items()
    }
    config = SimpleNamespace(precision="fp32")
    return SimpleNamespace(sources=sources, loaders=loaders, config=config, model=Constant(torch.zeros(3)))


def test_training_images_are_those_of_the_first_batch_with_their_labels(classified: Any) -> None:
    figure = training_sheet(classified)
    source = classified.sources["train"]
    order = classified.loaders["train"].sampler.order(0)[:8]
    assert len(figure.axes) == 8
    for axis, index in zip(figure.axes, order, strict=True):
        assert axis.get_title() == source.classes[source.labels[index]]
        np.testing.assert_allclose(shown(axis) * 255, np.asarray(source.image(index)), atol=1e-3)


def test_a_wrong_prediction_has_the_label_in_brackets(classified: Any) -> None:
    """Of 12 validation images, four of each class one after the other, every third of 8 halves is shown."""
    figure = prediction_sheet(classified, Constant(torch.tensor([0.0, 2.0, 1.0])))  # always "green"
    indices = [0, 1, 3, 4, 6, 7, 9, 10]  # number * 12 // 8
    labels = ["blue"] * 3 + ["green"] * 3 + ["red"] * 2
    assert [classified.sources["val"].labels[index] for index in indices] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [axis.get_title() for axis in figure.axes] == [
        "green" if label == "green" else f"green ({label})" for label in labels
    ]


def test_masks_lie_over_their_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (16, 12), (200, 100, 0)).save(tmp_path / split / "images" / f"{index}.png")
            mask = np.full((12, 16), 255, np.uint8)
            mask[:, :8] = 0
            mask[0, 0] = 1
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{index}.png")
    sources = {split: open_segmentation_source(tmp_path, split) for split in ("train", "val")}
    loaders = {
        split: build_segmentation_loader(source, segment_eval_transform((12, 16)), batch_size=2, train=split == "train")
        for split, source in sources.items()
    }
    model = Constant(torch.stack((torch.zeros(3, 4), torch.ones(3, 4))))  # always class 1
    run: Any = SimpleNamespace(sources=sources, loaders=loaders, config=SimpleNamespace(precision="fp32"), model=model)
    image = np.array([200, 100, 0])
    halves = [(image + np.array(class_colours()[number][:3])) / 2 for number in (0, 1)]  # as opaque as not
    first = shown(training_sheet(run).axes[0]) * 255
    np.testing.assert_allclose(first[5, 12], image, atol=1)  # 255 does not count
    np.testing.assert_allclose(first[5, 4], halves[0], atol=1.5)
    np.testing.assert_allclose(first[0, 0], halves[1], atol=1.5)
    np.testing.assert_allclose(
        shown(prediction_sheet(run, model).axes[0]) * 255, np.broadcast_to(halves[1], (12, 16, 3)), atol=1.5
    )


def test_a_run_leaves_them_and_tensorboard_shows_them(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcenet.training.run.draw", draw)
    folder = train(start(epochs=1))
    steps: Mapping[str, int] = {"training": 0, "curves": 3, "confusion": 3, "expert_load": 3, "predictions": 3}
    assert {path.name for path in folder.pictures.iterdir()} == {f"{name}.png" for name in steps}
    events = EventAccumulator(str(folder.logs / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    found = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert found == {f"pictures/{name}": [step] for name, step in steps.items()}
    for name in steps:
        (event,) = events.Images(f"pictures/{name}")
        with Image.open(folder.pictures / f"{name}.png") as picture:
            assert (event.width, event.height) == picture.size


def test_drawing_changes_nothing_that_is_learnt(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(start("plain", epochs=1))
    monkeypatch.setattr("pcenet.training.run.draw", draw)
    drawn = train(start("drawn", epochs=1))
    assert (plain.model / "model.safetensors").read_bytes() == (drawn.model / "model.safetensors").read_bytes()


def test_images_are_shown_as_they_were_before_they_were_normalised() -> None:
    """ImageNet's mean and deviation of red are 0.485 and 0.229; images that go to a GPU are bytes."""
    model = Constant(torch.zeros(3))
    red = seen(torch.tensor([1.0, 0.0, 9.0]).view(1, 3, 1, 1), model)[0, :, 0, 0]
    assert red.tolist() == pytest.approx([0.485 + 0.229, 0.456, 1.0])
    assert seen(torch.full((1, 3, 1, 1), 51, dtype=torch.uint8), model).unique().tolist() == pytest.approx([0.2])
