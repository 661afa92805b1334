"""Training a segmentation-models-pytorch decoder on one of our encoders, over the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.cli import main
from pcenet.models import load_model
from pcenet.models.decoded import DecodedNet


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures 30 x 42, each half black (0) and half white (1)."""
    root = tmp_path_factory.mktemp("data") / "halves"
    for split, count in (("train", 6), ("val", 2)):
        (root / split / "images").mkdir(parents=True)
        (root / split / "masks").mkdir()
        for index in range(count):
            mask = np.zeros((30, 42), dtype=np.uint8)
            mask[:, 12 + index :] = 1
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
            Image.fromarray(np.repeat(mask[..., None] * 255, 3, 2)).save(root / split / "images" / f"{index}.png")
    return root


def test_a_run_from_training_to_evaluation(halves, tmp_path):
    out = tmp_path / "run"
    options = {
        "--model": "unet:pce_nano_s2",
        "--model-args": '{"num_experts": 2, "decoder_widths": [8, 8, 8]}',
        "--data": str(halves),
        "--out": str(out),
        "--epochs": "1",
        "--batch-size": "3",
        "--input-size": "32x48",
        "--drop": "0.25",
    }
    machine = ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--workers", "0"]
    assert main(["train", "--task", "segment", *(part for pair in options.items() for part in pair), *machine]) == 0
    model = load_model(out / "model")
    assert isinstance(model, DecodedNet)
    assert (model.num_classes, model.model_args["drop_rate"]) == (2, 0.25)
    assert (model.model_args["num_experts"], model.model_args["decoder_widths"]) == (2, [8, 8, 8])
    assert model.pretrained_cfg["input_size"] == (3, 32, 48)
    assert main(["eval", str(out), *machine]) == 0
    trained = json.loads((out / "metrics.json").read_text())["val"]["miou"]
    assert json.loads((out / "eval-halves-val.json").read_text())["miou"] == pytest.approx(trained, abs=1e-9)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("unett:pce_nano_s2", [], "decoder 'unett' is unknown; take one of unet, "),
        ("unet:pce_nan_s2", [], "encoder 'pce_nan_s2' is unknown; take one of dense_nano, "),
        ("fpn:pce_nano", [], "decoder 'fpn' does not go with strides (1, 2, 4); take one of unet, "),
        ("unet:pce_nano_s2", ["--task", "classify"], "'unet:pce_nano_s2' is made to segment; give --task segment"),
        ("unet:pce_nano_s2", ["--model-args", '{"decoder_width": [8]}'], "unknown argument 'decoder_width'"),
        ("unet:pce_nano_s2", ["--model-args", '{"decoder_widths": [8]}'], "unet takes 3 on this encoder"),
    ],
)
def test_wrong_networks_end_in_one_line(model, more, message, halves, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--task", "segment", "--model", model, "--data", str(halves), "--out", str(out), "--workers", "0"]
    assert main(["train", *given, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()
