from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pcenet.runs.config import TrainConfig


@pytest.fixture(autouse=True, scope="session")
def _no_drawing() -> Iterator[None]:
    """The pictures of the single runs take longer than these runs; they have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.draw", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def recipe(pictures: Path) -> TrainConfig:
    """Options of a run that takes a second: 2 epochs of 3 steps."""
    return TrainConfig(data=str(pictures), epochs=2, batch_size=8, precision="fp32", device="cpu", workers=0)
