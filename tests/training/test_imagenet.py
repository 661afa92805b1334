"""The recipe for ImageNet on a folder of the same shape, with a few made images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.cli import main

CONFIG = Path(__file__).parents[2] / "experiments" / "imagenet.yaml"
CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Folders as torchvision lays them out: names of synsets, files .JPEG of different sizes, some of them grey."""
    generator = np.random.default_rng(0)
    for split, each in (("train", 40), ("val", 10)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                height, width = generator.integers(180, 420, 2)
                noise = generator.integers(0, 160, (height // 20, width // 20, 3), dtype=np.uint8)
                image = Image.fromarray(noise + 24 * number).resize((int(width), int(height)))
                (image.convert("L") if i % 20 == 19 else image).save(folder / f"{name}_{i}.JPEG")
    return tmp_path / "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pce_tiny", "dense_tiny"])
def test_the_recipe_trains_and_goes_on(model: str, imagenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "--config", str(CONFIG), "--model", model, "--data", str(imagenet), "--out", str(out)]
    # As in the file, but for what takes hundreds of GPU hours.
    command += ["--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--max-images", "64"]
    command += ["--precision", "fp32", "--device", "cpu", "--workers", "2"]
    assert main([*command, "--dry-run"]) == 0
    assert not (out / "model").exists()
    assert main([*command, "--resume", "auto"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["epochs"] == 2
    assert 0 <= metrics["val"]["top1"] <= 1
    manifest = json.loads((out / "model" / "config.json").read_text())
    assert manifest["num_classes"] == len(CLASSES)
    assert main([*command, "--resume", "auto"]) == 0  # it is over
