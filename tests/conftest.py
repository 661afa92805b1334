"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("pcenet", derandomize=True, deadline=None, max_examples=15, database=None)
settings.load_profile("pcenet")

# The tensors of most tests have a few pixels: a second thread would spend its time waiting for the first.
THREADS = 1


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    # Set for the session, because fixtures of wider scope than a test train networks: sums that are split over another
    # number of threads are rounded differently, and runs are compared bit for bit.
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


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
