"""Behaviour as it was recorded: the keys and configurations of the networks to the letter, what they compute to 1e-10.

These are frozen values, not derived ones: what is right stands in the other tests. They show that a change of how things
are computed changes nothing that is computed. `record.py` says how to record a deliberate change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.recipes import HERE, PARTS, SAVED, digests, differences, losses, pretrained, saved

# Over two seconds.
SLOW = {"pce_small", "pce_small_spec", "pce_tiny_s2", "pce_unet_tiny", "torchvision resnet18"}
# Options that had one useful value each, and with it no meaning: which of two equal implementations ran, who is dropped
# first, how experts are normalised. A configuration may name them or not.
GONE = {"dispatch", "priority", "norm"}
PLAIN = ("tensors", "config", "converted")
# Rounding to float32, relative to the largest number of an output. One convolution sums up to K = 9 * 96 products, which
# rounds by sqrt(K) * 6e-8 = 2e-6 of its result; some 12 in a row, each normalised, come to 1e-5 if they grow no more
# than a few times, which is what is seen (up to 3e-6). Routings hold, since their margins are larger.
FLOAT32 = 2e-5


def expected_of(part: str) -> dict[str, Any]:
    return json.loads((HERE / f"{part}.json").read_text(encoding="utf-8"))


EXPECTED = {part: expected_of(part) for part in PARTS}
CASES = [
    pytest.param(part, name, marks=[pytest.mark.slow] if name in SLOW else [], id=f"{part}: {name}")
    for part in PARTS
    for name in PARTS[part]
]


def without_gone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_gone(entry) for key, entry in value.items() if key not in GONE}
    return value


def assert_recorded(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for group, content in expected.items():
        if group in PLAIN:
            assert without_gone(found[group]) == without_gone(content), group
        else:
            assert differences(found[group], content, tolerance) == [], group


@pytest.mark.parametrize("part", PARTS)
def test_every_recipe_is_recorded(part: str) -> None:
    assert EXPECTED[part].keys() == PARTS[part].keys()


@pytest.mark.parametrize(("part", "name"), CASES)
def test_as_recorded(part: str, name: str) -> None:
    assert_recorded(digests(PARTS[part][name]()), EXPECTED[part][name])
