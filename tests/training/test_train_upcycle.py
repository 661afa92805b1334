"""Training timm's networks, from weights of another run, dense and upcycled, over the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pcenet.cli import main
from pcenet.comparison.config import CompareConfig
from pcenet.comparison.run import check_networks
from pcenet.models import TimmNet, create_network, load_model
from pcenet.runs.config import TrainConfig
from pcenet.training.network import build_model

NETWORK = ["--model", "timm:resnet18", "--model-args", '{"channels": [8, 8, 16, 16]}', "--input-size", "32"]
MACHINE = ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def dense(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the dense network."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    assert main(["train", *NETWORK, "--data", str(pictures), "--out", str(out), "--epochs", "1", *MACHINE]) == 0
    return out


def upcycled(dense: Path, pictures: Path, out: Path, *more: str) -> list[str]:
    start = ["--init", str(dense), "--upcycle", "--upcycle-args", '{"layers": ["layer1", "layer2"], "patch_size": 2}']
    return ["train", *NETWORK, *start, "--data", str(pictures), "--out", str(out), "--epochs", "1", *MACHINE, *more]


@pytest.mark.slow
def test_a_run_from_a_dense_one_to_its_explanation(dense, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    # So small a step that the weights are still those of the beginning, to six digits.
    assert main(upcycled(dense, pictures, out, "--lr", "1e-9", "--ema-decay", "0")) == 0
    printed = capsys.readouterr().out
    assert "converted 7 convolutions to 4 experts each, by name (layer1, layer2)" in printed
    assert f"starting from the weights of {dense}" in printed
    model, before = load_model(out / "model"), load_model(dense / "model")
    assert isinstance(model, TimmNet)
    for name, tensor in before.named_parameters():
        ours = model.get_parameter(name if name in dict(model.named_parameters()) else name[:-6] + "kernels.shared")
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6)
    assert main(["eval", str(out), *MACHINE]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads((out / "eval-pictures-val.json").read_text())["top1"] == metrics["val"]["top1"]
    routers = {"network.layer1.0.conv1", "network.layer1.1.conv1", "network.layer2.0.conv2", "network.layer2.1.conv1"}
    assert set(metrics["val_router"]) == routers
    files = [str(pictures / "val" / "red" / "0.png")]
    assert main(["predict", str(out), *files, "--out", str(tmp_path / "predictions"), "--routing", *MACHINE]) == 0
    (image,) = json.loads((tmp_path / "predictions" / "predictions.json").read_text())["predictions"]
    assert {len(rows) for rows in image["routing"].values()} == {4}
    explained = tmp_path / "explanation"
    assert main(["explain", str(out), "--out", str(explained), "--max-images", "6", *MACHINE]) == 0
    report = json.loads((explained / "explain.json").read_text())
    assert {layer["name"] for layer in report["layers"]} == routers


def test_an_interrupted_run_needs_what_it_started_from_no_more(dense, pictures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(upcycled(dense, pictures, whole)) == 0
    steps = ["--checkpoint-minutes", "0"]
    copy = tmp_path / "copy"
    copy.symlink_to(dense)
    assert main(upcycled(copy, pictures, parts, *steps)) == 0
    # As if it had been killed before its model was written.
    for name in ("metrics.json", "model/model.safetensors", "model/config.json"):
        (parts / name).unlink()
    copy.unlink()
    assert main(upcycled(copy, pictures, parts, *steps, "--resume", "auto")) == 0
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_classifier_starts_afresh_and_another_network_is_refused(dense, save_classifier, tmp_path, capsys):
    digits = ["--data", "digits", "--out", str(tmp_path / "run"), "--dry-run", "--batch-size", "8", *MACHINE]
    assert main(["train", *NETWORK, "--init", str(dense), *digits]) == 0
    other = ["--model", "timm:resnet18", "--model-args", '{"channels": [8, 8, 16, 24]}', "--input-size", "32"]
    capsys.readouterr()
    assert main(["train", *other, "--init", str(dense), *digits]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "init: " in error
    assert "does not fit the network: tensor network.layer4.0.bn1.bias has shape (16,), expected (24,)" in error


def test_pixels_of_other_classes_are_classified_afresh(tmp_path):
    for name in ("pce_unet_nano", "dense_unet_nano"):
        trained = create_network(name, num_classes=5)
        trained.save_pretrained(tmp_path / name)
        config = TrainConfig(task="segment", model=name, init=str(tmp_path / name))
        torch.manual_seed(1)
        found, same = build_model(config, "abc"), build_model(config, "abcde")
        assert found.head[-1].weight.shape[0] == 3
        ours, theirs = found.state_dict(), trained.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith("head."))
        assert torch.equal(same.head[-1].weight, trained.head[-1].weight)
        check_networks(CompareConfig([name], recipe=config), build=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "timm:resnet81"], "timm has no network 'resnet81'; did you mean"),
        (["--model", "pce_nano", "--upcycle"], "upcycle is for networks of timm, not for pce_nano"),
        ([*NETWORK, "--upcycle-args", '{"layers": 1.0}'], "upcycle_args have no effect without upcycle"),
        ([*NETWORK, "--upcycle", "--upcycle-args", '{"layers": "layer7"}'], "layers: 'layer7' is no 3x3 convolution"),
        ([*NETWORK, "--upcycle", "--upcycle-args", '{"layer": "layer4"}'], "unexpected options ['layer']"),
        ([*NETWORK, "--pretrained", "--init", "x"], "pretrained and init are both weights to start from"),
        ([*NETWORK, "--init", "nowhere"], "init: nowhere is no run folder or model folder"),
        (["--model", "timm:resnet18", "--model-args", '{"chanels": [8]}'], "make no network: "),
        (["--model", "timm:resnet18", "--model-args", '{"pretrained": true}'], "give --pretrained"),
        (["--model", "timm:resnet18", "--task", "segment"], "is made to classify; give --task classify"),
        (["--model", "pce_tiny", "--pretrained"], "pce_tiny has no bundled weights"),
    ],
)
def test_mistakes_end_in_one_line(options, message, pictures, tmp_path, capsys):
    assert main(["train", *options, "--data", str(pictures), "--out", str(tmp_path / "run"), *MACHINE]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
