"""A trained network knows its classes, their mask values and what does not count: what data do not say, it does."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.app.config import AppConfig
from pcenet.app.server import open_samples
from pcenet.catalogue import bundled
from pcenet.cli import main
from pcenet.data import DataError
from pcenet.models import SavableModel, create_network, load_model
from pcenet.runs.config import EvalConfig
from pcenet.tasks.evaluation import evaluate, open_trained

# Of 16 x 16 pixels: so many rows of each mask value. 0 and 255 do not count for the network below.
ROWS = {1: 5, 2: 4, 4: 3, 0: 3, 255: 1}
SHARES = {"road": 5 / 12, "tree": 4 / 12, "sky": 3 / 12}


def put(root: Path, split: str, rows: dict[int, int] = ROWS) -> None:
    """One image and its mask."""
    mask = np.repeat(np.array([*rows], dtype=np.uint8), [*rows.values()])[:, None].repeat(16, 1)
    for kind, content in (("images", np.zeros((16, 16, 3), dtype=np.uint8)), ("masks", mask)):
        (root / split / kind).mkdir(parents=True)
        Image.fromarray(content).save(root / split / kind / "0.png")


def save(folder: Path, **knows: Any) -> Path:
    torch.manual_seed(0)
    model = create_network(
        "pce_unet_nano",
        num_classes=3,
        widths=[8, 8, 8],
        num_experts=2,
        pretrained_cfg_overlay={"input_size": (3, 16, 16)},
    )
    model.class_names = ["road", "tree", "sky"]
    for name, value in knows.items():
        setattr(model, name, value)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def network(tmp_path: Path) -> str:
    return str(save(tmp_path / "net", mask_values=[1, 2, 4], ignored_values=[0, 255]))


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Masks in the split alone that is measured."""
    put(tmp_path / "street", "val")
    return tmp_path / "street"


def test_the_record_is_saved_and_loaded(network: str, tmp_path: Path) -> None:
    model = load_model(network)
    assert (model.class_names, model.mask_values, model.ignored_values) == (
        ["road", "tree", "sky"],
        [1, 2, 4],
        [0, 255],
    )
    config = json.loads((Path(network) / "config.json").read_text())
    assert (config["mask_values"], config["ignored_values"]) == ([1, 2, 4], [0, 255])
    everything_counts = load_model(save(tmp_path / "all", mask_values=[0, 1, 255], ignored_values=[]))
    assert (everything_counts.mask_values, everything_counts.ignored_values) == ([0, 1, 255], [])
    old = load_model(save(tmp_path / "old"))
    assert (old.mask_values, old.ignored_values) == (None, None)
    assert "mask_values" not in json.loads((tmp_path / "old" / "config.json").read_text())


def measured(network: str, street: Path, **options: Any) -> dict[str, float]:
    """Share of the pixels that count, by class."""
    result = evaluate(
        EvalConfig(network, data=str(street), device="cpu", workers=0, out=str(street.parent / "results"), **options)
    )
    assert result.pixels == 12 * 16
    return {name: values["share"] for name, values in result.per_class.items()}


@pytest.mark.parametrize("training", ["none", "of other values"])
def test_data_that_say_nothing_have_the_classes_of_the_network(network: str, street: Path, training: str) -> None:
    if training != "none":
        put(street, "train", {0: 8, 7: 8})
    assert measured(network, street) == pytest.approx(SHARES)


def test_names_of_the_data_are_compared_and_what_does_not_count_is_the_networks(
    tmp_path: Path, network: str, street: Path
) -> None:
    (street / "classes.txt").write_text("void\nroad\ntree\nodd\nsky\n")  # mask values 0 to 4
    with pytest.raises(
        ValueError, match=r"classes of street are not those of .*net: only in street: odd; give the net"
    ):
        evaluate(EvalConfig(network, data=str(street), device="cpu", workers=0))
    other = save(tmp_path / "other", mask_values=[5, 6, 7], ignored_values=[0, 255])
    put(tmp_path / "own", "val", {1: 5, 2: 4, 3: 3, 0: 4})
    (tmp_path / "own" / "classes.txt").write_text("void\nroad\ntree\nsky\n")
    assert measured(str(other), tmp_path / "own") == pytest.approx(SHARES)  # of one name, of other values
    put(tmp_path / "from_0", "val", {0: 5, 1: 4, 2: 3, 255: 4})
    (tmp_path / "from_0" / "classes.txt").write_text("road\ntree\nsky\n")
    assert measured(network, tmp_path / "from_0") == pytest.approx(SHARES)  # 0 is a class where it is called like one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["void", "road", "tree", "x", "hill"]}, "only in .*net: sky; only in street: x, hill"),
        ({"ignore_index": 4}, "only in .*net: sky; give the network's names with --classes"),
        (
            {"classes": ["tree", "road", "sky"]},
            "the same classes in another order, road, tree, sky and tree, road, sky",
        ),
    ],
)
def test_what_the_user_says_goes_first_and_is_compared(
    network: str, street: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_trained(EvalConfig(network, data=str(street), **options))


def test_a_split_is_measured_whole(network: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / "street", split)
    for number in range(1, 8):
        for kind in ("images", "masks"):
            folder = tmp_path / "street" / "train" / kind
            shutil.copy(folder / "0.png", folder / f"{number}.png")
    assert len(open_trained(EvalConfig(network, data=str(tmp_path / "street"), split="train")).source) == 8


def test_only_what_is_measured_needs_masks(network: str, tmp_path: Path) -> None:
    put(tmp_path / "street", "val")
    put(tmp_path / "street", "train")
    shutil.rmtree(tmp_path / "street" / "train" / "masks")
    assert measured(network, tmp_path / "street") == pytest.approx(SHARES)


def test_another_value_that_does_not_count_goes_with_the_names_of_the_network(network: str, tmp_path: Path) -> None:
    put(tmp_path / "street", "val", {1: 5, 2: 4, 4: 3, 9: 4})
    assert measured(network, tmp_path / "street", ignore_index=9) == pytest.approx(SHARES)


def test_a_value_that_the_network_does_not_know_is_named(network: str, tmp_path: Path) -> None:
    put(tmp_path / "street", "val", ROWS | {3: 1, 255: 0})
    source = open_trained(EvalConfig(network, data=str(tmp_path / "street"))).source
    with pytest.raises(DataError, match=r"'val/masks/0\.png': the mask has the value\(s\) 3, which are of no class"):
        source.mask(0)


def test_a_network_that_was_saved_before_asks_for_the_classes(tmp_path: Path, street: Path) -> None:
    old = str(save(tmp_path / "old"))
    with pytest.raises(ValueError, match="the classes are unknown"):
        open_trained(EvalConfig(old, data=str(street)))
    put(street, "train")
    with pytest.raises(ValueError, match=r"only in .*old: road, tree, sky; only in street: 1, 2, 4; give"):
        open_trained(EvalConfig(old, data=str(street), ignore_index=0))


def test_samples_of_a_page_have_the_classes_of_the_network(
    network: str, street: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def classes(**options: Any) -> tuple[str, ...]:
        source = open_samples(AppConfig(network, data=str(street), **options), load_model(network), None)
        assert source is not None
        return source.classes

    assert classes() == ("road", "tree", "sky")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert classes(classes=["a", "b", "c", "d", "e"]) == ("b", "c", "d", "e")
    assert "samples of other classes: classes of street are not those of" in caplog.text


def test_a_run_leaves_what_its_network_knows(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / "street", split)
    arguments = ["--input-size", "16x16", "--batch-size", "1", "--epochs", "1", "--threads", "1", "--workers", "0"]
    small = ["--model-args", '{"widths": [8, 8, 8], "num_experts": 2}', "--ignore-index", "0"]
    data, run = str(tmp_path / "street"), str(tmp_path / "run")
    assert (
        main(["train", "--task", "segment", "--data", data, "--out", run, "--device", "cpu", *arguments, *small]) == 0
    )
    model = load_model(tmp_path / "run" / "model")
    assert (model.class_names, model.mask_values, model.ignored_values) == (["1", "2", "4"], [1, 2, 4], [0, 255])
    put(tmp_path / "elsewhere", "val")
    assert list(measured(str(tmp_path / "run" / "model"), tmp_path / "elsewhere").values()) == [5 / 12, 4 / 12, 3 / 12]


def test_bundled_segmentation_networks_know_their_masks() -> None:
    for name in ("camvid/pce_unet_nano", "camvid/dense_unet_nano"):
        assert name in bundled()
        model = load_model(name)
        assert (model.mask_values, model.ignored_values) == ([*range(11)], [11, 255])
        architecture = name.partition("/")[2]
        again: SavableModel = create_network(architecture, pretrained=True)
        assert (again.mask_values, again.ignored_values) == ([*range(11)], [11, 255])
        assert create_network(architecture, pretrained=True, num_classes=5).mask_values is None
