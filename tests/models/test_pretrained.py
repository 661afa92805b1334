"""The weights that come with the package: found by name, by timm and by the program, and all in order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import pcenet
from pcenet.catalogue import CONFIG, bundled, weights_root
from pcenet.cli import main
from pcenet.models import PCENet, PCEUNet, create_network, load_model
from pcenet.models.pretrained import WEIGHTS

CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay"]
SCENE = ["sky", "road", "tree"]
Bundle = Callable[..., Any]


def images(channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(2))


def same(first: nn.Module, second: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether two networks have the same tensors, those of some names aside."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert set(but) <= one.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# What is there in truth.


def test_nothing_strange_lies_among_the_weights() -> None:
    root = weights_root()
    assert root == Path(pcenet.__file__).parent / "weights"
    expected = {f"{name}/{file}" for name in bundled() for file in (CONFIG, WEIGHTS, "README.md")} | {"README.md"}
    assert {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("name", bundled())
def test_bundled_weights_are_in_order(name: str) -> None:
    folder, network = weights_root() / name, name.partition("/")[2]
    assert max(path.stat().st_size for path in folder.iterdir()) < 6e6
    config = json.loads((folder / CONFIG).read_text())
    assert config["architecture"] == network
    assert config["model_args"] == json.loads(json.dumps(create_network(network).model_args))
    assert len(config["label_names"]) == config["num_classes"]
    model = load_model(name)
    assert len(model.class_names) == config["num_classes"]
    if name == min(each for each in bundled() if each.endswith(f"/{network}")):  # of several, the first by name
        assert same(create_network(network, pretrained=True), model)
    assert name in (folder / "README.md").read_text()


# As timm has it.


def test_timm_makes_a_network_with_its_weights(bundle: Bundle) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    for name in ("pce_nano", "pce_nano.cifar10"):
        model = timm.create_model(name, pretrained=True)
        assert same(model, trained), name
        assert torch.equal(run(model, images()), run(trained, images()))
        assert model.class_names == CLASSES
    assert timm.list_pretrained("pce_*") == ["pce_nano.cifar10"]
    cfg = timm.get_pretrained_cfg("pce_nano")
    assert (cfg.architecture, cfg.tag, cfg.num_classes, cfg.input_size) == ("pce_nano", "cifar10", 10, (3, 32, 32))
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg.label_names, cfg.first_conv, cfg.classifier) == (tuple(CLASSES), "stem.0.0", "head.fc")


def test_the_configuration_beside_the_weights_decides_on_preprocessing_and_classes(bundle: Bundle) -> None:
    overlay = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    bundle("pets/pce_nano", ["cat", "dog"], pretrained_cfg_overlay=overlay)
    model = timm.create_model("pce_nano", pretrained=True)
    assert {key: model.pretrained_cfg[key] for key in overlay} == overlay
    assert (model.num_classes, model.class_names) == (2, ["cat", "dog"])


def test_without_pretrained_the_weights_are_fresh(bundle: Bundle) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    torch.manual_seed(0)
    model = timm.create_model("pce_nano")
    assert not same(model, trained)
    assert model.class_names is None


def test_another_number_of_classes_gets_a_fresh_classifier(bundle: Bundle) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    model = timm.create_model("pce_nano", pretrained=True, num_classes=3)
    assert model.get_classifier().weight.shape == (3, 96)
    assert model.class_names is None
    assert same(model.stem, trained.stem)
    assert same(model.stages, trained.stages)
    assert same(model.norm, trained.norm)
    features = timm.create_model("pce_nano", pretrained=True, num_classes=0)
    assert torch.equal(run(features, images()), trained.forward_head(run_features(trained), pre_logits=True))


def run_features(model: PCENet) -> Tensor:
    with torch.no_grad():
        return model.forward_features(images())


def test_features_alone_are_those_of_the_trained_network(bundle: Bundle) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    model = timm.create_model("pce_nano", pretrained=True, features_only=True)
    with torch.no_grad():
        expected = trained.forward_intermediates(images(), intermediates_only=True)
    for found, wanted in zip(run(model, images()), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("network", ["pce_nano", "pce_unet_nano"])
def test_grey_images(bundle: Bundle, network: str) -> None:
    """One channel that stands for three equal ones: its weights are the sum of theirs."""
    trained = bundle(f"pets/{network}", CLASSES)
    model = create_network(network, pretrained=True, in_chans=1)
    assert same(model, trained, but=("stem.0.0.weight",))
    expected = trained.stem[0][0].weight.detach().sum(1, keepdim=True)
    torch.testing.assert_close(model.stem[0][0].weight.detach(), expected)
    assert model.class_names == CLASSES


def test_the_first_tag_in_the_alphabet_is_the_default(bundle: Bundle) -> None:
    other = bundle("pets/pce_nano", ["cat", "dog"])
    first = bundle("cifar10/pce_nano", CLASSES)
    assert bundled() == ["cifar10/pce_nano", "pets/pce_nano"]
    assert same(timm.create_model("pce_nano", pretrained=True), first)
    assert same(timm.create_model("pce_nano.pets", pretrained=True), other)


def test_networks_without_bundled_weights_are_as_ever(bundle: Bundle) -> None:
    bundle("cifar10/pce_nano", CLASSES)
    assert timm.list_pretrained("dense_nano*") == []
    assert timm.get_pretrained_cfg("dense_nano").tag is None
    with pytest.raises(RuntimeError, match="No pretrained weights exist for dense_nano"):
        timm.create_model("dense_nano", pretrained=True)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("dense_nano.cifar10", pretrained=True)
    rule = "has no bundled weights; leave it out; bundled weights are cifar10/pce_nano"
    for name in ("dense_nano", "pce_unet_nano", "unet:pce_nano"):
        with pytest.raises(ValueError, match=f"pretrained=True: {name} {rule}"):
            create_network(name, pretrained=True)


def test_weights_go_with_the_arguments_or_are_refused(bundle: Bundle) -> None:
    bundle("cifar10/pce_nano", CLASSES)
    bundle("camvid/pce_unet_nano", SCENE)
    for name in ("pce_nano", "pce_unet_nano"):
        with pytest.raises(ValueError, match=rf"weights of {name} do not fit \{{'num_experts': 2\}}; leave out"):
            create_network(name, pretrained=True, num_experts=2)
    assert create_network("pce_nano", pretrained=True, border="exchange").model_args["border"] == "exchange"


def test_the_users_own_network_keeps_its_own_preprocessing(bundle: Bundle, tmp_path: Path) -> None:
    bundle("cifar10/pce_nano", CLASSES)
    own = timm.create_model("pce_nano", num_classes=2, pretrained_cfg_overlay={"mean": (0.0, 0.1, 0.2)})
    own.class_names = ["cat", "dog"]
    own.save_pretrained(tmp_path / "own")
    loaded = load_model(tmp_path / "own")
    assert same(loaded, own)
    assert (loaded.class_names, loaded.pretrained_cfg["mean"]) == (["cat", "dog"], (0.0, 0.1, 0.2))
    assert str(tmp_path) not in (tmp_path / "own" / CONFIG).read_text() + (tmp_path / "own" / "README.md").read_text()


# Segmentation, which timm does not know.


def test_a_segmentation_network_with_its_weights(bundle: Bundle) -> None:
    overlay = {"input_size": (3, 64, 96), "mean": (0.1, 0.2, 0.3)}
    trained = bundle("camvid/pce_unet_nano", SCENE, pretrained_cfg_overlay=overlay)
    model = pcenet.create_network("pce_unet_nano", pretrained=True)
    assert isinstance(model, PCEUNet)
    assert (model.num_classes, model.class_names) == (3, SCENE)
    assert {key: model.pretrained_cfg[key] for key in overlay} == overlay
    assert torch.equal(run(model, images(height=64, width=96)), run(trained, images(height=64, width=96)))
    fresh = create_network("pce_unet_nano")
    assert (fresh.num_classes, fresh.class_names) == (11, None)
    assert fresh.pretrained_cfg["input_size"] == (3, 192, 256)
    assert not same(fresh.stages, trained.stages)


def test_a_segmentation_network_for_other_classes_gets_a_fresh_head(bundle: Bundle) -> None:
    trained = bundle("camvid/pce_unet_nano", SCENE)
    model = create_network("pce_unet_nano", pretrained=True, num_classes=5, drop_rate=0.1)
    assert model.head[1].weight.shape == (5, 24, 1, 1)
    assert model.class_names is None
    for part in ("stem", "stages", "levels", "norm"):
        assert same(model.get_submodule(part), trained.get_submodule(part)), part


# By name.


def test_a_name_loads_the_weights(bundle: Bundle) -> None:
    assert bundled() == []
    for name, classes in (("cifar10/pce_nano", CLASSES), ("camvid/pce_unet_nano", SCENE)):
        trained = bundle(name, classes)
        for load in (load_model, type(trained).from_pretrained, lambda name: load_model(Path(name))):
            model = load(name)
            assert type(model) is type(trained)
            assert same(model, trained)
            assert (model.class_names, model.training) == (classes, False)
    assert bundled() == ["camvid/pce_unet_nano", "cifar10/pce_nano"]
    assert load_model("cifar10/pce_nano", border="zero").model_args["border"] == "zero"
    with pytest.raises(ValueError, match="holds a PCEUNet, not a PCENet"):
        PCENet.from_pretrained("camvid/pce_unet_nano")


def test_a_folder_of_that_name_goes_first(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle("cifar10/pce_nano", CLASSES)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    own = timm.create_model("pce_nano", num_classes=2)
    own.save_pretrained("cifar10/pce_nano")
    assert same(load_model("cifar10/pce_nano"), own)
    assert same(PCENet.from_pretrained("cifar10/pce_nano"), own)
    shutil.rmtree("cifar10/pce_nano")
    Path("cifar10/pce_nano").mkdir()
    with pytest.raises(
        ValueError, match=r"cifar10/pce_nano holds no config\.json; give a folder \S+ by save_pretrained$"
    ):
        load_model("cifar10/pce_nano")


def test_a_name_that_is_nothing_lists_what_is_bundled(bundle: Bundle) -> None:
    loads = (load_model, lambda name: PCENet.from_pretrained(name, local_files_only=True))
    for load in loads:
        with pytest.raises(ValueError, match=r"cifar10/pce_nono.*no weights are bundled"):
            load("cifar10/pce_nono")
    bundle("cifar10/pce_nano", CLASSES)
    bundle("camvid/pce_unet_nano", SCENE)
    for load in loads:
        with pytest.raises(
            ValueError, match=r"cifar10/pce_nono.*bundled weights are camvid/pce_unet_nano, cifar10/pce_nano"
        ):
            load("cifar10/pce_nono")
    for path in ("./cifar10/pce_nono", "a/cifar10/pce_nono", "pce_nono", "/cifar10/pce_nono"):
        with pytest.raises(ValueError, match=r"by save_pretrained$"):
            load_model(path)


# By the program.


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two pictures of each class in both splits, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in CLASSES:
            Path("pictures", split, label).mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"pictures/{split}/{label}/{index}.png")
    return "pictures"


def test_eval_and_predict_take_the_name(bundle: Bundle, pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    quick = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
    assert main(["eval", "cifar10/pce_nano", "--data", pictures, *quick]) == 0
    written = json.loads(Path("eval-pictures-val.json").read_text())
    assert (written["model"], written["images"]) == ("pce_nano", 20)
    assert main(["predict", "cifar10/pce_nano", f"{pictures}/val", *quick]) == 0
    predictions = json.loads(Path("predictions/predictions.json").read_text())
    assert predictions["classes"] == CLASSES
    right = [Path(record["file"]).parent.name == record["label"] for record in predictions["predictions"]]
    assert sum(right) / 20 == written["top1"]
    mean, std = (torch.tensor(trained.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    first = predictions["predictions"][0]
    pixels = torch.from_numpy(np.array(Image.open(first["file"]))).permute(2, 0, 1) / 255
    expected = run(trained, ((pixels - mean) / std)[None]).softmax(1)[0].max().item()
    assert first["probability"] == pytest.approx(expected, abs=1e-5)
    capsys.readouterr()
    assert main(["eval", "cifar10/pce_nano"]) == 2
    assert "which names no data; give --data SOURCE" in capsys.readouterr().err
    for command in (["eval", "cifar10/pce_nono", "--data", pictures], ["predict", "cifar10/pce_nono", pictures]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "run: cifar10/pce_nono is no run folder or model folder" in error
        assert error.endswith("; bundled weights are cifar10/pce_nano\n")


def test_models_shows_the_tags(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    bundle("cifar10/pce_nano", CLASSES)
    bundle("pets/pce_nano", ["cat", "dog"])
    bundle("camvid/pce_unet_nano", SCENE)
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["weights"] for row in rows if row["weights"]} == {
        "pce_nano": ["cifar10", "pets"],
        "pce_unet_nano": ["camvid"],
    }
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for word in ("weights", "cifar10", "pets", "camvid"):
        assert any(word in line for line in lines), word


# As a user finds it.


@pytest.mark.slow
def test_an_installed_package_loads_them_without_a_network(bundle: Bundle, tmp_path: Path) -> None:
    trained = bundle("cifar10/pce_nano", CLASSES)
    package = tmp_path / "site" / "pcenet"
    shutil.copytree(Path(pcenet.__file__).parent, package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copytree(tmp_path / "weights", package / "weights")
    code = (
        "import socket, timm, pcenet, torch\n"
        "def refuse(*_): raise AssertionError('a network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "first = timm.create_model('pce_nano', pretrained=True)\n"
        "second = pcenet.load_model('cifar10/pce_nano')\n"
        f"assert pcenet.__file__.startswith({str(tmp_path)!r})\n"
        "print(first.class_names == second.class_names, first.stem[0][0].weight.sum().item())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    same_names, total = done.stdout.split()
    assert same_names == "True"
    assert float(total) == pytest.approx(trained.stem[0][0].weight.sum().item(), abs=1e-4)
