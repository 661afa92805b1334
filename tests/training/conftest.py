from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcenet.training.config import TrainConfig


@pytest.fixture(autouse=True, scope="session")
def _no_drawing() -> Iterator[None]:
    """Drawing the pictures of a run takes longer than the runs of these tests; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.pictures_of", lambda *_: {})
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy 32 x 32 pictures, each brightest in one colour: 24 for training, 12 for validation."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    for split, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng((len(split), channel, index))
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 90
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def start(pictures: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Options of a run that takes a second: `pce_nano`, the pictures, 2 epochs of 3 steps."""

    def options(name: str = "run", **changes: Any) -> TrainConfig:
        values = {
            "data": str(pictures),
            "out": str(tmp_path / name),
            "epochs": 2,
            "batch_size": 8,
            "precision": "fp32",
            "device": "cpu",
            "workers": 0,
        }
        return TrainConfig(**(values | changes))

    return options
