"""Test-time augmentation: the mean over an image and its mirror image, in ``predict`` and in ``eval``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import pcenet
from pcenet.cli import main
from pcenet.data import cover_transform
from pcenet.nn import PCELayer
from pcenet.tasks import get_task
from pcenet.tasks.answers import answer
from pcenet.tasks.classification import evaluate_model

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
DEVICE = torch.device("cpu")


class FirstRow(nn.Module):
    """The logits of an image stand in its first row; those of the mirror image are the same, in reverse."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]


class Columns(nn.Module):
    """Two classes; the logit of the first is the pixel's red value, doubled in the left half of the image."""

    def forward(self, images: Tensor) -> Tensor:
        factor = torch.where(torch.arange(images.shape[-1]) < images.shape[-1] / 2, 2.0, 1.0)
        return torch.stack([images[:, 0] * factor, torch.zeros_like(images[:, 0])], 1)


def test_the_mean_is_of_probabilities() -> None:
    # softmax of (ln 8, 0, 0) is 0.8, 0.1, 0.1; that of the mirror image (0, 0, ln 8) is 0.1, 0.1, 0.8.
    images = torch.tensor([math.log(8), 0, 0]).expand(1, 3, 2, 3)
    logits, records = answer(FirstRow(), images, tta=True)
    assert logits.exp()[0].tolist() == pytest.approx([0.45, 0.1, 0.45])
    assert records == {}
    assert answer(FirstRow(), images)[0][0].tolist() == pytest.approx([math.log(8), 0, 0])
    apart, _ = answer(FirstRow(), torch.tensor([1e4, 0, -1e4]).expand(1, 3, 2, 3), tta=True)
    assert apart.isfinite().all()
    assert apart.exp()[0].tolist() == pytest.approx([0.5, 0, 0.5])


def test_pixels_are_mirrored_back() -> None:
    # Red values ln 2, ln 3. Left pixel: twice its logit, 4/5; in the mirror image, on the right, 2/3. Right pixel: 3/4
    # and, on the left, 9/10.
    images = torch.tensor([math.log(2), math.log(3)]).expand(1, 3, 1, 2)
    logits, _ = answer(Columns(), images, tta=True)
    assert logits.exp()[0, 0, 0].tolist() == pytest.approx([(4 / 5 + 2 / 3) / 2, (3 / 4 + 9 / 10) / 2])


def test_measured_of_images_by_hand() -> None:
    images = torch.tensor([math.log(8), 0, 0]).expand(1, 3, 2, 3)
    given = ([(images, torch.tensor([label])) for label in (0, 1)], ("cat", "dog", "emu"))
    plain = evaluate_model(FirstRow(), *given, device=DEVICE, precision="fp32")
    result = evaluate_model(FirstRow(), *given, device=DEVICE, precision="fp32", tta=True)
    assert plain.loss == pytest.approx(-(math.log(0.8) + math.log(0.1)) / 2)
    assert result.loss == pytest.approx(-(math.log(0.45) + math.log(0.1)) / 2)


def test_measured_of_pixels_by_hand() -> None:
    # Red values -ln 2 and ln 1.5. Left: 1/5 and 1/3, the second class either way. Right: 3/5 and, on the left, 9/13.
    images = torch.tensor([-math.log(2), math.log(1.5)]).expand(1, 3, 1, 2)
    batches = [[(images, [torch.tensor([[1, 1]])])]]
    result = get_task("segment").evaluate(Columns(), batches, ("a", "b"), device=DEVICE, precision="fp32", tta=True)
    left, right = 1 - (1 / 5 + 1 / 3) / 2, 1 - (3 / 5 + 9 / 13) / 2
    assert result.loss == pytest.approx(-(math.log(left) + math.log(right)) / 2)
    assert result.confusion == [[0, 0], [1, 1]]


def test_router_health_is_that_of_the_images_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PCELayer(3, 3, patch_size=4, num_experts=2)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images).mean((2, 3))

    net, seen = Net(), []
    images = torch.randn(2, 3, 8, 16)
    with torch.no_grad():
        for parameter in net.layer.router.parameters():  # both experts are to be chosen
            parameter.normal_()
    net.layer.router.register_forward_hook(lambda module, given, routing: seen.append(routing.expert_ids.clone()))
    result = evaluate_model(
        net, [(images, torch.tensor([0, 1]))], ("a", "b", "c"), device=DEVICE, precision="fp32", tta=True
    )
    own, mirrored = ([(each == e).sum().item() / 16 for e in range(2)] for each in seen)  # 8 patches in each image
    assert own != mirrored, "the mirror images must be routed otherwise for this test to mean something"
    assert result.router["layer"]["load"] == own


def test_predicted_labels_are_of_both(
    model_folder: Path, noise: Callable[..., Image.Image], encode: Callable[..., bytes], lay_out: Callable[..., None]
) -> None:
    image = noise(0, 32, 32)
    lay_out({"a.png": encode(image), "mirrored.png": encode(ImageOps.mirror(image))})
    files = ["a.png", "mirrored.png"]
    assert main(["predict", str(model_folder), *files, "--top", "7", "--routing", "--out", "plain", *CPU]) == 0
    assert main(["predict", str(model_folder), *files, "--top", "7", "--routing", "--tta", "--out", "both", *CPU]) == 0
    plain, both = (json.loads(Path(name, "predictions.json").read_text()) for name in ("plain", "both"))
    assert (plain["tta"], both["tta"]) == (False, True)
    own, mirrored = ({each["label"]: each["probability"] for each in item["top"]} for item in plain["predictions"])
    assert own != pytest.approx(mirrored, abs=1e-3), "left and right must matter for this test to mean something"
    mean = {label: (own[label] + mirrored[label]) / 2 for label in own}
    for item, alone in zip(both["predictions"], plain["predictions"], strict=True):
        assert {each["label"]: each["probability"] for each in item["top"]} == pytest.approx(mean, abs=1e-5)
        assert item["routing"] == alone["routing"]
    found = pcenet.predict(model_folder, image, tta=True, top=7, precision="fp32")[0]
    assert dict(found.top) == pytest.approx(mean, abs=1e-5)
    with pytest.raises(ValueError, match="tta must be True or False, got 2"):
        pcenet.predict(model_folder, image, tta=2)


def test_masks_and_stored_figures_are_of_both(
    segmenter_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    image, truth = noise(0, 48, 32), np.random.default_rng(0).integers(0, 4, (32, 48), dtype=np.uint8)
    lay_out({"data/val/images/a.png": encode(image), "data/val/masks/a.png": encode(Image.fromarray(truth))})
    lay_out({"data/classes.txt": b"sky\nroad\ntree\ncar"})
    model = pcenet.load_model(segmenter_folder)
    prepared = cover_transform((32, 48))(image)[None]
    with torch.inference_mode():
        plain = model(prepared).softmax(1)
        both = (plain + model(prepared.flip(-1)).softmax(1).flip(-1)) / 2
    masks = [each[0].argmax(0).numpy() for each in (plain, both)]
    assert (masks[0] != masks[1]).any(), "the mirror image must matter for this test to mean something"
    found = model.predict(image, tta=True, precision="fp32")[0].mask
    assert np.mean(found != masks[1]) < 0.002
    evaluate = ["eval", str(segmenter_folder), "--data", "data", "--out", ".", *CPU]
    assert main(evaluate) == 0
    assert main([*evaluate, "--tta"]) == 0
    for name, tta, mask in (("eval-data-val.json", False, masks[0]), ("eval-data-val-tta.json", True, masks[1])):
        written = json.loads(Path(name).read_text())
        assert written["tta"] is tta
        assert written["pixel_accuracy"] == pytest.approx(np.mean(mask == truth), abs=0.002)
