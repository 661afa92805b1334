from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcenet.runs.config import TrainConfig


@pytest.fixture(autouse=True, scope="session")
def _no_drawing() -> Iterator[None]:
    """Drawing the pictures of a run takes longer than the runs of these tests; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.draw", lambda *_: None)
        yield


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
