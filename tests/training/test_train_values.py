"""What the values of images and masks mean is the same for training, evaluation and prediction."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.app.config import AppConfig
from pcenet.cli import main
from pcenet.explanation.config import ExplainConfig
from pcenet.models import load_model
from pcenet.parsing import parse
from pcenet.runs.config import CheckDataConfig, EvalConfig, TrainConfig
from pcenet.tasks.evaluation import open_trained

SMALL = ["--model-args", '{"widths":[8,8,8],"num_experts":2}', "--input-size", "16", "--epochs", "1"]
QUICK = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--threads", "1"]
RANGE = ["--grey-range", "[0, 4095]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same grey images as 8 bits, and as a camera's 12 bits in files of 16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pcenet.training.run.draw", lambda *_: None)
    for number, folder in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        for name in ("8", "12"):
            Path(name, folder).mkdir(parents=True)
        for index in range(2):
            grey = np.random.default_rng((number, index)).integers(0, 256, (16, 16))
            Image.fromarray(grey.astype(np.uint8)).save(f"8/{folder}/{index}.png")
            Image.fromarray((grey << 4).astype(np.uint16)).save(f"12/{folder}/{index}.png")
    return tmp_path


def rows(folder: str) -> list[list[str]]:
    """What was predicted, without the names of the files."""
    with Path(folder, "predictions.csv").open() as file:
        return [row[1:] for row in csv.reader(file)]


def test_12_bits_train_and_predict_as_8_bits_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--batch-size", "4", *SMALL, *QUICK]
    assert main([*train, "--data", "12", "--out", "refused"]) == 2
    error = capsys.readouterr().err
    assert "'train/cat/0.png': its grey values, " in error
    assert "nearly black" in error
    assert "--grey-range '[0, 4095]'" in error
    assert not Path("refused").exists()
    assert main([*train, "--data", "8", "--out", "of8"]) == 0
    assert main([*train, "--data", "12", "--out", "of12", *RANGE]) == 0
    assert Path("of8/model/model.safetensors").read_bytes() == Path("of12/model/model.safetensors").read_bytes()
    assert json.loads(Path("of12/model/config.json").read_text())["grey_range"] == [0, 4095]
    assert "grey_range" not in json.loads(Path("of8/model/config.json").read_text())

    # The network keeps the range.
    assert main(["predict", "of8", "8/val", "--out", "a", *QUICK]) == 0
    assert main(["predict", "of12", "12/val", "--out", "b", *QUICK]) == 0
    assert rows("a") == rows("b")
    source = open_trained(EvalConfig("of12")).source
    assert np.asarray(source.image(0)).tolist() == np.asarray(open_trained(EvalConfig("of8")).source.image(0)).tolist()

    # One that has none leaves such files out by name, and can be told.
    capsys.readouterr()
    assert main(["predict", "of8", "12/val", "8/val/cat", "--out", "c", *QUICK]) == 0
    left_out = json.loads(Path("c/predictions.json").read_text())["left_out"]
    assert [entry["file"] for entry in left_out] == [
        f"12/val/{name}.png" for name in ("cat/0", "cat/1", "dog/0", "dog/1")
    ]
    assert all("--grey-range '[0, 4095]'" in entry["reason"] for entry in left_out)
    assert main(["predict", "of8", "12/val", "--out", "d", *QUICK, *RANGE]) == 0
    assert rows("d") == rows("a")
    assert main(["eval", "of8", "--data", "12", *QUICK]) == 2
    assert main(["check-data", "12"]) == 1
    assert main(["check-data", "12", *RANGE]) == 0


def test_a_saved_range_that_is_none(here: Path, tmp_path: Path) -> None:
    from pcenet.models import create_network

    model = create_network("pce_nano", num_classes=2, widths=[8, 8, 8], num_experts=2)
    model.grey_range = [0, 1023]
    model.save_pretrained("model")
    assert load_model("model").grey_range == [0, 1023]
    values = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(values | {"grey_range": [0, "x"]}))
    with pytest.raises(ValueError, match=r"config\.json .*grey_range must be two whole numbers"):
        load_model("model")


COMMANDS = {
    "train": (TrainConfig, []),
    "eval": (EvalConfig, ["run"]),
    "check-data": (CheckDataConfig, ["data"]),
    "explain": (ExplainConfig, ["run"]),
    "app": (AppConfig, ["run"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_commands_take_the_same_values(command: str) -> None:
    kind, words = COMMANDS[command]

    def given(*options: str) -> Sequence[object]:
        config = parse(command, kind, [*words, *options, *(["--task", "segment"] if command == "train" else [])])
        return config.ignore_index, config.grey_range

    assert given() == (None, None)
    assert given("--ignore-index", "none", "--grey-range", "[-5, 4095]") == ("none", [-5, 4095])
    assert given("--ignore-index", "11") == (11, None)
    for options, message in (
        (["--ignore-index", "nine"], "ignore_index must be a whole number or null or none, got 'nine'"),
        (["--ignore-index", "-1"], "ignore_index must be at least 0, got -1"),
        (["--grey-range", "[9, 1]"], r"grey_range must be two whole numbers, .* got \[9, 1\]"),
        (["--grey-range", "[1]"], r"grey_range must be two whole numbers, .* got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            given(*options)


def test_what_counts_is_kept_with_a_run(here: Path) -> None:
    """A network of the classes 0 and 255 is measured on both without being told again."""
    for split, count in (("train", 2), ("val", 1)):
        for kind in ("images", "masks"):
            Path("binary", split, kind).mkdir(parents=True)
        for index in range(count):
            mask = np.random.default_rng(index).integers(0, 2, (16, 16)).astype(np.uint8) * 255
            Image.fromarray(mask).convert("RGB").save(f"binary/{split}/images/{index}.png")
            Image.fromarray(mask).save(f"binary/{split}/masks/{index}.png")
    train = ["train", "--task", "segment", "--data", "binary", "--batch-size", "2", "--out", "run", *QUICK]
    small = ["--input-size", "16x16", "--epochs", "1", "--model-args", '{"widths":[8,8,8],"num_experts":2}']
    assert main([*train, *small, "--ignore-index", "none"]) == 0
    assert load_model("run/model").class_names == ["0", "255"]
    assert main(["eval", "run", *QUICK]) == 0
    figures = json.loads(Path("run/eval-binary-val.json").read_text())
    assert figures["pixels"] == 256
