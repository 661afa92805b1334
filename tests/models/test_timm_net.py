"""Classifiers of timm as networks of this package: made, upcycled, saved, loaded."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import logging as hub_logging

import pcenet
from pcenet.models import TimmNet, create_network, input_size_of, task_of, twin_of
from pcenet.models.hub import SavableModel
from pcenet.nn import PCEConv2d

NARROW = {"channels": (8, 16, 24, 32), "pretrained_cfg_overlay": {"input_size": (3, 48, 48)}}


def narrow(**options: Any) -> TimmNet:
    model = create_network("timm:resnet18", num_classes=3, **NARROW, **options)
    assert isinstance(model, TimmNet)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return model.eval()


def test_it_is_timms_network() -> None:
    torch.manual_seed(0)
    ours = create_network("timm:test_resnet", num_classes=5, drop_rate=0.1).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert (task_of("timm:test_resnet"), twin_of("timm:test_resnet")) == ("classify", None)
    assert input_size_of("timm:resnet10t") == (3, 176, 176)
    assert ours.get_classifier() is ours.network.fc
    assert (ours.pretrained_cfg["crop_pct"], ours.pretrained_cfg["interpolation"]) == (1.0, "bilinear")


@pytest.mark.parametrize("upcycled", [False, True])
def test_round_trip(upcycled: bool, tmp_path) -> None:
    model = narrow()
    if upcycled:
        record = model.upcycle(num_experts=3, balancing="none")
        assert [layer.patch_size for layer in record.converted] == [2, 2, 2, 1, 1, 1]
        for module in model.modules():
            if isinstance(module, PCEConv2d):
                torch.nn.init.normal_(module.kernels.difference)
    model.class_names = ["leaf", "pavement", "sky"]
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "timm:resnet18"
    assert ("upcycling" in config["model_args"]) == upcycled
    x = torch.randn(2, 3, 40, 56)
    for loaded in (pcenet.load_model(tmp_path / "model"), SavableModel.from_pretrained(tmp_path / "model")):
        assert loaded.class_names == ["leaf", "pavement", "sky"]
        assert loaded.pretrained_cfg["input_size"] == (3, 48, 48)
        assert torch.equal(loaded(x), model(x))
        assert loaded.model_args.keys() == model.model_args.keys()


def test_a_frozen_network_trains_its_classifier() -> None:
    model = narrow()
    model.upcycle(freeze="pretrained")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"network.fc.weight", "network.fc.bias"} <= trained
    assert all(name.startswith("network.fc") or ".router." in name or "difference" in name for name in trained)
    with pytest.raises(ValueError, match="timm:resnet18 is upcycled already"):
        model.upcycle()


@pytest.mark.parametrize("name", ["vgg11", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_networks_of_other_kinds_can_be_made_without_memory(name: str) -> None:
    """As loading does, to compare shapes before anything is allocated; without stochastic depth where there is none."""
    with torch.device("meta"):
        assert create_network(f"timm:{name}", num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet81", {}, "timm has no network 'resnet81'; did you mean 'resnet18'"),
        ("timm:pce_nano", {}, "is a network of this package: give pce_nano"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "checkpoint_path: no argument of the network resnet18"),
        ("timm:resnet18", {"features_only": True}, "features_only: no argument of the network"),
        ("timm:local-dir:x", {}, "timm has no network 'local-dir:x'"),
    ],
)
def test_what_is_no_network_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network(name, **options)


def test_weights_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error, and no word of each try; afterwards the Hub's client speaks as before."""
    verbosity = hub_logging.get_verbosity()

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(
        ValueError, match="could not get the weights of resnet18, which come from the Hugging Face Hub: no"
    ):
        create_network("timm:resnet18", pretrained=True)
    assert "Retrying" not in capsys.readouterr().err + caplog.text
    assert hub_logging.get_verbosity() == verbosity
    with pytest.raises(OSError, match="no route"):
        create_network("timm:resnet18")
