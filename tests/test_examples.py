"""The examples: short, and each learns something. `make examples` runs those marked slow, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
LINES = 40
# What each prints last, and bounds that only a network which has learnt keeps: of ten digits a guess finds a tenth, the
# commonest class of the scenes has a third of their pixels, and an untrained detector's losses add up to 3.1.
BOUNDS = {
    "timm_train": ("top-1", 0.5, 1.0),
    "lightning_module": ("top-1", 0.5, 1.0),
    "trainer": ("top-1", 0.5, 1.0),
    "segmentation_models": ("IoU", 0.4, 1.0),
    "detection": ("loss", 0.0, 2.5),
}


def test_all_are_short_and_tested() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py") if path.stem != "demo"}
    assert lengths.keys() == BOUNDS.keys()
    assert max(lengths.values()) <= LINES, lengths


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    what, least, most = BOUNDS[name]
    found = re.fullmatch(rf"{what} ([\d.]+)", done.stdout.strip().splitlines()[-1])
    assert found, done.stdout
    assert least < float(found[1]) < most, done.stdout
