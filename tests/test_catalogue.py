"""What is known without torch says the same as what torch would, and costs no time."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pcenet import catalogue, data
from pcenet.models import describe, list_models


def test_the_stored_table_is_what_networks_are() -> None:
    """After a change of a network: ``python experiments/networks.py``."""
    assert list(catalogue.networks()) == list_models()
    for name, about in catalogue.networks().items():
        assert about == describe(name), name


def test_the_named_data_sets_are_those_that_can_be_opened() -> None:
    assert catalogue.SOURCES == {"classify": data.SOURCE_NAMES, "segment": data.SEGMENTATION_SOURCE_NAMES}


@pytest.mark.parametrize(
    ("words", "code", "seconds"),
    [
        ("--help", 0, 0.3),
        ("models", 0, 1.0),
        ("train --model pce_nanoo", 2, 1.5),
        ("train --model pce_unet_nano --task classify", 2, 1.5),
        ("train --data nowhere", 2, 1.5),
        ("train --init nowhere", 2, 1.5),
        ("eval nowhere", 2, 1.5),
        ("predict cifar10/pce_nana x.png", 2, 1.5),
        ("explain nowhere", 2, 1.5),
        ("export nowhere", 2, 1.5),
    ],
)
def test_mistakes_in_names_cost_no_time(words: str, code: int, seconds: float, tmp_path: Path) -> None:
    """Processor time; twice what is promised is allowed, for a machine may be slow at the moment."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pcenet", *words.split()], cwd=tmp_path, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * seconds
    if code:
        assert done.stderr.startswith("pcenet: error: ")
        assert done.stderr.count("\n") == 1
