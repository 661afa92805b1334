"""Networks with one PCE layer, small pictures with awkward names, and a report on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.cli import main
from pcenet.data import IMAGENET_MEAN, IMAGENET_STD
from pcenet.models import create_network
from pcenet.nn import PCELayer

CLASSES = ["$a_b$ & <b>c", "<img src=x onerror=alert(1)>\x1b[31m\u202e", "_plain"]  # sorted
FILE = '"><script>alert(2)<i>\x1b]0;x\x07\u200b'
QUICK = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
Explain = Callable[..., Path]


def save_network(folder: Path, name: str, classes: list[str], images: list[Path], patches: list[int | None]) -> None:
    """An untrained network whose answers and experts differ from image to image, as a fresh one's do not."""
    pixels = torch.stack([eval_image(path) for path in images])
    torch.manual_seed(2)
    model = create_network(
        name,
        num_classes=len(classes),
        widths=[8] * len(patches),
        patch_sizes=patches,
        pretrained_cfg_overlay={"input_size": (3, *pixels.shape[2:])},
        **({"num_experts": 2} if any(patches) else {}),
    )
    model.class_names = classes
    with torch.no_grad():
        (model.head[-1] if model.task == "segment" else model.get_classifier()).weight.mul_(300)
        for layer in model.modules():
            if isinstance(layer, PCELayer):
                layer.router.logits.weight.mul_(30)
                layer.experts.norm2.weight.normal_()
        model.train()
        for _ in range(30):  # statistics, and the bias that spreads patches over experts
            model(pixels)
    model.save_pretrained(folder)


def eval_image(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy((np.array(image) / 255 - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1).float()


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, with four images of each of three classes in val, ``routed``, with one PCE layer, and ``dense``."""
    root = tmp_path_factory.mktemp("awkward")
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                rng = np.random.default_rng((len(split), number, index))
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                pixels[:, : 8 * (number + 1), number] += 120
                Image.fromarray(pixels).save(folder / f"{FILE}{index}.png")
    images = sorted((root / "data" / "train").rglob("*.png"))
    save_network(root / "routed", "pce_nano", CLASSES, images, [None, None, 2])
    save_network(root / "dense", "dense_nano", CLASSES, images, [None] * 3)
    return root


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, two scenes in val of sky above road, the last column unlabelled, and ``routed``."""
    root = tmp_path_factory.mktemp("street")
    for split in ("train", "val"):
        for index in range(2):
            rng = np.random.default_rng((len(split), index))
            mask = np.zeros((32, 48), np.uint8)
            mask[16:] = 1
            mask[:, -1] = 255
            pixels = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
            pixels[:16, :, 2] += 180
            for kind, array in (("images", pixels), ("masks", mask)):
                folder = root / "data" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{index}.png")
        (root / "data" / "classes.txt").write_text("sky\nroad\n")
    images = sorted((root / "data" / "train" / "images").iterdir())
    save_network(root / "routed", "pce_unet_nano", ["sky", "road"], images, [None, None, 2])
    return root


@pytest.fixture(scope="session")
def report(awkward: Path) -> Path:
    """The folder of a report on ``routed`` with its twin."""
    out = awkward / "report"
    arguments = [str(awkward / "routed"), "--data", str(awkward / "data"), "--twin", str(awkward / "dense")]
    assert main(["explain", *arguments, "--shown", "2", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture
def explain(awkward: Path, tmp_path: Path) -> Explain:
    """Explains ``routed`` with further options into a folder, without interventions unless it is asked for them."""

    def run(*options: str, name: str = "out") -> Path:
        arguments = [str(awkward / "routed"), "--data", str(awkward / "data"), "--shown", "1", *QUICK]
        out = tmp_path / name
        assert main(["explain", *arguments, "--intervention-images", "0", "--out", str(out), *options]) == 0
        return out

    return run
