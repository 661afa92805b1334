"""Behaviour as it was recorded: the keys and configurations of the networks to the letter, what they compute to 1e-10.

These are frozen values, not derived ones: what is right stands in the other tests. They show that a change of how
things are computed changes nothing that is computed. `record.py` says how to record a deliberate change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.recipes import HERE, PARTS, SAVED, differences, digests, losses, pretrained, saved

# Half a second or more. The rest has every kind of layer and of network.
SLOW = {f"pce_{size}" for size in ("small", "small_spec", "tiny_spec", "tiny_s2", "unet_tiny")}
SLOW |= {"dense_small", "dense_tiny_s2", "dense_unet_tiny", "torchvision resnet18"}
# Options that had one useful value each, and with it no meaning: which of two equal implementations ran, who is dropped
# first, how experts are normalised. A configuration may name them or not.
GONE = {"dispatch", "priority", "norm"}
PLAIN = ("tensors", "config", "converted")  # groups that must be equal
# Rounding to float32, relative to the largest number of an output. One convolution sums up to K = 9 * 96 products and
# rounds by sqrt(K) * 6e-8 = 2e-6 of its result. A dozen in a row, each normalised, come to sqrt(12) as much, 7e-6, and
# may grow a little; seen are up to 1.3e-6. No routing changes: margins are larger.
FLOAT32 = 2e-5
# Of the training: a step's loss is rounded by up to 1e-7 (seen: 1e-8 to 9e-8 in the first one). All weights shifted by
# a part e (3e-7 to 1e-5, in float64) shift the losses by up to 1.1 e in the first ten steps and by 5 e in fifty, and no
# patch changes its expert. Were all roundings to add up: 10 * 1e-7 * 1.1 and 50 * 1e-7 * 5. Seen with oneDNN on and off
# and with two implementations of the layers: 2e-7 and 1.5e-6.
FLOAT32_FIRST_TEN, FLOAT32_FIFTY = 2e-6, 3e-5


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


@pytest.mark.parametrize("name", PARTS["pretrained"])
def test_bundled_weights_in_float32(name: str) -> None:
    assert_recorded(digests(pretrained(name, torch.float32)), EXPECTED["pretrained"][name], FLOAT32)


@pytest.mark.parametrize("name", PARTS["saved"])
def test_saved_networks_in_float32(name: str) -> None:
    assert_recorded(digests(saved(name, dtype=torch.float32)), EXPECTED["saved"][name], FLOAT32)


def with_dispatch(value: Any, dispatch: str) -> Any:
    """A configuration in which ``dispatch``, wherever it stands, has another value."""
    if isinstance(value, dict):
        return {key: dispatch if key == "dispatch" else with_dispatch(entry, dispatch) for key, entry in value.items()}
    return value


@pytest.mark.parametrize("name", PARTS["saved"])
def test_saved_networks_name_what_is_gone_and_load_all_the_same(name: str, tmp_path: Path) -> None:
    """`test_as_recorded` loads the folders as they are; here is one that was saved for compiling or exporting."""
    folder = Path(shutil.copytree(SAVED / name, tmp_path / name))
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert '"dispatch": "sorted"' in text
    assert '"priority": "gate"' in text
    assert ('"norm": "batch"' in text) == (name != "upcycled")  # whose convolutions never had one
    (folder / "config.json").write_text(json.dumps(with_dispatch(json.loads(text), "static")), encoding="utf-8")
    assert '"dispatch": "static"' in (folder / "config.json").read_text(encoding="utf-8")
    assert_recorded(digests(saved(name, folder)), EXPECTED["saved"][name])


def farthest(found: list[float], expected: list[float]) -> float:
    return max(abs(new - old) / old for new, old in zip(found, expected, strict=True))


def test_fifty_losses() -> None:
    expected = expected_of("training")["losses"]
    assert expected[-1] < expected[0] / 10  # it learns
    assert farthest(losses(torch.float64), expected) < 1e-10
    found = losses(torch.float32)
    assert farthest(found[:10], expected[:10]) < FLOAT32_FIRST_TEN
    assert farthest(found, expected) < FLOAT32_FIFTY
