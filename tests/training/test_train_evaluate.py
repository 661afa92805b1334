from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from pcenet.data import IMAGENET_STD, eval_transform, open_source
from pcenet.models import create_network
from pcenet.nn import PCELayer
from pcenet.tasks.classes import check_same_classes
from pcenet.tasks.classification import eval_transform_of, evaluate_model, model_loader
from pcenet.tasks.evaluation import eval_batch_size, result_path

CPU = torch.device("cpu")


class ReadOff(nn.Module):
    """The logits of an image stand in its first row."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :]


def images_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[:, None, None, :].expand(-1, 3, 2, -1).contiguous()


def test_classes_are_the_same_in_either_unicode_form() -> None:
    check_same_classes(["caf\u00e9", "dog"], ["cafe\u0301", "dog"], "model", "data")
    with pytest.raises(
        ValueError, match=r"only in model: Cat; only in data: cat\. There is 'cat', which differs in case"
    ):
        check_same_classes(["Cat", "dog"], ["cat", "dog"], "model", "data")


def test_figures_of_a_hand_made_confusion_matrix() -> None:
    sure, half = math.log(8), math.log(2)  # softmax of (ln 8, 0, 0) is 0.8, 0.1, 0.1; of (ln 2, 0, 0) 0.5, 0.25, 0.25
    rows = [[sure, 0, 0], [0, sure, 0], [0, sure, 0], [0, half, 0], [half, 0, 0]]
    labels = [0, 0, 1, 1, 1]
    batches = [
        (images_of(rows[:2]), torch.tensor(labels[:2])),
        (images_of(rows[2:]), torch.tensor(labels[2:])),
    ]
    result = evaluate_model(ReadOff(), batches, ("cat", "dog", "emu"), device=CPU, precision="fp32")
    assert result.confusion == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert result.images == 5
    assert result.top1 == 3 / 5
    assert result.top5 is None
    assert result.per_class == {
        "cat": {"images": 2, "accuracy": 0.5},
        "dog": {"images": 3, "accuracy": 2 / 3},
        "emu": {"images": 0, "accuracy": None},
    }
    # Confidence 0.8 three times, right twice; 0.5 twice, right once.
    assert result.calibration_error == pytest.approx(3 / 5 * abs(0.8 - 2 / 3) + 2 / 5 * abs(0.5 - 1 / 2), abs=1e-6)
    losses = [-math.log(p) for p in (0.8, 0.1, 0.8, 0.5, 0.25)]
    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert result.router == {}


def test_top5_counts_labels_among_the_five_highest() -> None:
    ascending = [0.0, 1, 2, 3, 4, 5]  # class 0 comes last of six
    batches = [(images_of([ascending] * 4), torch.tensor([0, 1, 2, 5]))]
    result = evaluate_model(ReadOff(), batches, "abcdef", device=CPU, precision="fp32")
    assert result.top1 == 1 / 4
    assert result.top5 == 3 / 4


def test_router_health_counts_every_patch_of_the_split() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PCELayer(3, 3, patch_size=4, num_experts=2)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images).mean((2, 3))

    net = Net()
    with torch.no_grad():
        net.layer.router(torch.zeros(1, 3, 8, 8))
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]
    result = evaluate_model(net, batches, ("a", "b", "c"), device=CPU, precision="fp32")
    health = result.router["layer"]
    with torch.no_grad():
        chosen = torch.cat([net.layer.router(images).expert_ids for images, _ in batches])
    assert health["load"] == [(chosen == e).sum().item() / 24 for e in range(2)]  # 4 patches in each of 6 images
    assert health["drop_rate"] == 0
    assert not net.training


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (["a", "b"], ["a", "b", "c"], "only in data: c"),
        (["a", "b"], ["a"], "only in model: b"),
        (["a", "b"], ["a", "x"], "only in model: b; only in data: x"),
        (["a", "b"], ["b", "a"], "another order, a, b and b, a"),
    ],
)
def test_other_classes_are_refused_by_name(expected: list[str], found: list[str], message: str) -> None:
    check_same_classes(expected, list(expected), "model", "data")
    with pytest.raises(ValueError, match=message):
        check_same_classes(expected, found, "model", "data")


def test_figures_of_sources_of_one_name_and_of_networks_get_files_of_their_own(tmp_path: Path) -> None:
    def store(source: str, split: str = "val", **network: str) -> str:
        path = result_path(tmp_path, "birds", {"source": source} | network, split)
        path.write_text(json.dumps({"source": source} | network))
        return path.name

    assert store("a/birds.zip") == "eval-birds-val.json"
    assert store("b/birds.zip") == "eval-birds-2-val.json"
    assert store("birds/") == "eval-birds-3-val.json"
    assert store("b/birds.zip", "test") == "eval-birds-test.json"
    assert [store(source) for source in ("birds/", "b/birds.zip", "a/birds.zip")] == [
        "eval-birds-3-val.json",
        "eval-birds-2-val.json",
        "eval-birds-val.json",
    ]
    # Outside of run folders, the figures of two networks.
    assert store("c.zip", "test", run="one") == "eval-birds-2-test.json"
    assert store("c.zip", "test", run="two") == "eval-birds-3-test.json"
    assert store("c.zip", "test", run="one") == "eval-birds-2-test.json"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"source": 3}', "\xff"])
def test_a_file_that_is_no_evaluation_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval-birds-val.json").write_text(content, encoding="latin-1")
    assert result_path(tmp_path, "birds", {"source": "birds.zip"}, "val").name == "eval-birds-2-val.json"


def test_images_are_prepared_as_the_model_asks() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    model = timm.create_model("pce_nano", pretrained_cfg_overlay={"input_size": (3, 24, 24), "mean": (0.1, 0.2, 0.3)})
    expected = eval_transform(24, mean=(0.1, 0.2, 0.3), std=IMAGENET_STD)(image)
    assert torch.equal(eval_transform_of(model)(image), expected)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"crop_pct": 0.875}, "crop_pct=0.875 in the model's pretrained_cfg: images are only ever prepared with 1.0"),
        ({"interpolation": "bicubic"}, "interpolation='bicubic' in the model's pretrained_cfg: .* with 'bilinear'"),
    ],
)
def test_another_preparation_is_refused(overlay: dict[str, Any], message: str) -> None:
    model = timm.create_model("pce_nano", pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match=message):
        model_loader(model, open_source("digits", "val"), batch_size=8, workers=0)


@pytest.mark.parametrize(
    ("name", "side", "images"),
    [("dense_nano", 32, 256), ("dense_nano", 512, 64), ("dense_nano", 4096, 1), ("dense_unet_nano", 1024, 8)],
)
def test_a_step_has_no_more_images_than_fit_the_budget(name: str, side: int, images: int) -> None:
    """4096 x 4096 pixels, as one image of that size has, are 64 of 512 x 512 and 16 of 1024 x 1024."""
    model = create_network(name, pretrained_cfg_overlay={"input_size": (3, side, side)})
    assert eval_batch_size(model) == images
