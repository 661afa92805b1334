"""A network as a folder."""

import errno
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

from pcenet.models import PCENet, create_network, load_model
from pcenet.upcycling import upcycle


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("pce_nano", num_classes=3, num_experts=2, border="exchange", drop_rate=0.1).eval()
    model.class_names = ["leaf", "pavement", "sky"]
    with torch.no_grad():  # statistics that are not those of a new network
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(model, folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    x = torch.randn(2, 3, 40, 36)
    for loaded in (PCENet.from_pretrained(folder), load_model(folder)):
        assert not loaded.training
        assert loaded.class_names == ["leaf", "pavement", "sky"]
        assert loaded.model_args == model.model_args
        assert loaded.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
        assert torch.equal(loaded(x), model(x))


def test_through_the_hub(model, tmp_path, monkeypatch):
    """huggingface_hub's own methods, with a stand-in for the server: a folder."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / repo_id / filename)
    )
    monkeypatch.setattr("pcenet.models.hub.snapshot_download", lambda repo_id, **_: str(tmp_path / repo_id))
    model.push_to_hub("me/pavements")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(PCENet.from_pretrained("me/pavements")(x), model(x))
    card = ModelCard.load(tmp_path / "me/pavements/README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "mixture-of-experts" in card.data.tags
    assert card.data.license is None, "that is for the owner of the weights to say"
    assert "3 classes: leaf, pavement, sky." in card.text


def test_timm_loads_it_too(model, folder):
    x = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    # It makes other ends anew, and has the features.
    features = model.forward_features(x)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert torch.equal(other.forward_features(x), features)
    assert other(x).shape == (2, 7)
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
    expected = model.state_dict()["stem.0.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()["stem.0.0.weight"], expected)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)(x).shape == (2, 96)


def test_overrides(model, folder):
    x = torch.randn(2, 3, 32, 32)
    loaded = PCENet.from_pretrained(folder, border="zero")
    assert loaded.model_args["border"] == "zero"
    assert not torch.equal(loaded(x), model(x))


def with_arguments(folder, to, arguments):
    """A copy of a model folder whose configuration says more."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["model_args"] |= arguments
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("dispatch", ["sorted", "static", "anything", None])
def test_a_network_saved_with_removed_options_at_what_is_left_of_them_is_the_same(model, folder, tmp_path, dispatch):
    old = with_arguments(folder, tmp_path / "old", {"dispatch": dispatch, "priority": "gate", "norm": "batch"})
    x = torch.randn(2, 3, 32, 32)
    for loaded in (load_model(old), PCENet.from_pretrained(old)):
        assert torch.equal(loaded(x), model(x))
        assert loaded.model_args == model.model_args


@pytest.mark.parametrize(("option", "value", "left"), [("priority", "order", "gate"), ("norm", "group", "batch")])
def test_a_network_saved_with_what_was_removed_says_so(folder, tmp_path, option, value, left):
    old = with_arguments(folder, tmp_path / "old", {option: value})
    message = f"config.json .*model_args: {option}='{value}' was removed, '{left}' is all that is left"
    with pytest.raises(ValueError, match=message):
        load_model(old)


def test_the_same_network_gives_the_same_bytes(model, folder, tmp_path):
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()


def test_whoever_may_read_the_configuration_may_read_the_weights(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_an_argument_of_none_survives(tmp_path):
    PCENet.save_pretrained(timm.model_entrypoint("pce_nano")(capacity_factor=None), tmp_path)
    assert load_model(tmp_path).model_args["capacity_factor"] is None


def test_saved_defaults_survive_a_change_of_defaults(folder):
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    assert arguments["gate_input"] == "pixels"
    assert arguments["patch_sizes"] == [None, 4, 1]


@pytest.mark.slow
def test_loading_needs_no_training_code(folder):
    code = (
        f"import sys, pcenet; m = pcenet.load_model({str(folder)!r}); "
        "assert not {'lightning', 'torchmetrics', 'matplotlib', 'jsonargparse'} & set(sys.modules); "
        "print(m.class_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['leaf', 'pavement', 'sky']\n"


def _drop(weights):
    del weights["norm.0.weight"]


def _add(weights):
    weights["extra"] = torch.zeros(1)


def _reshape(weights):
    weights["head.fc.weight"] = torch.zeros(4, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "tensor norm.0.weight is missing"),
        (_add, "tensor extra is not part of the network"),
        (_reshape, r"tensor head.fc.weight has shape \(4, 96\), expected \(3, 96\)"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_the_run_folder_around_it_will_do(folder, tmp_path):
    ours, theirs = load_model(tmp_path).state_dict(), load_model(folder).state_dict()
    assert folder == tmp_path / "model"
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_broken_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path / "empty")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "resnet18", "model_args": {}}))
    with pytest.raises(ValueError, match="architecture 'resnet18' is not a network of this package"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "os.system"}))
    with pytest.raises(ValueError, match=r"architecture 'os\.system' is not a network of this package"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no configuration of a PCE network"):
        load_model(folder)


@pytest.mark.parametrize("pool", ["max", "catavgmax", ""])
def test_another_head_is_saved_too(model, tmp_path, pool):
    model.reset_classifier(0 if pool == "" else 5, pool)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path)(x), model(x))


def test_networks_that_could_not_be_loaded_are_not_saved(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="was pruned"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="no registered name"):
        PCENet(patch_sizes=(None,) * 4).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def another_head(model):
    model.head.fc = nn.Linear(96, 5)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.head.fc)


def other_names(model):
    model.class_names = ["leaf", "sky"]


def a_range_of_numpy(model):
    model.grey_range = (np.int64(0), np.int64(4095))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_head, r"head\.fc\.bias has shape \(5,\), expected \(3,\); call reset_classifier"),
        (parametrised, r"head\.fc\.parametrizations\.weight\.original0 is not part of the network"),
        (other_names, "cannot be saved: label_names must be 3 names"),
        (a_range_of_numpy, "cannot be saved: Object of type int64 is not JSON serializable"),
        (lambda model: upcycle(model, layers=["stages.0.0.body.0"]), "is not part of the network"),
    ],
)
def test_a_network_that_its_arguments_no_longer_make_is_not_saved(model, folder, change, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("write", ["write_bytes", "write_text"])
def test_a_full_disk_costs_a_saved_network_nothing(model, folder, monkeypatch, write):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.class_names = ["new", "other", "names"]
    model.head.fc.weight.data.zero_()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"pcenet.models.hub.{write}", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tensors_that_share_memory_are_saved(model, tmp_path):
    model.head.fc.weight = nn.Parameter(model.head.fc.weight.detach()[:1].expand(3, -1))
    model.save_pretrained(tmp_path)
    found, expected = load_model(tmp_path).state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["pce_unet_nano", "dense_unet_nano_position"])
def test_a_mask_has_a_byte_for_each_pixel(name):
    with pytest.raises(ValueError, match="num_classes 256 must be at most 255 to segment"):
        create_network(name, num_classes=256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"expert": 3}}, "unexpected arguments"),
        ({"model_args": {"widths": "abc"}}, "is no configuration of a PCE network"),
        ({"model_args": {"patch_sizes": [2, 4, 1]}}, "patch must shrink strictly"),
        ({"model_args": 3}, "is no configuration of a PCE network"),
        ({"pretrained_cfg": {"mean": "grey"}}, "is no configuration of a PCE network"),
        ({"pretrained_cfg": None}, "is no configuration of a PCE network"),
        ({"num_classes": "many"}, "is no configuration of a PCE network"),
    ],
)
def test_a_wrong_configuration_is_a_value_error(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_configuration_that_is_nested_too_deeply_is_a_value_error(folder):
    (folder / "config.json").write_text("[" * 10**5)
    for load in (load_model, PCENet.from_pretrained):
        with pytest.raises(ValueError, match="nested"):
            load(folder)


def test_an_override_that_the_weights_do_not_fit_is_named(folder):
    for load in (load_model, PCENet.from_pretrained):
        message = r"with num_classes=5: tensor head\.fc\.bias has shape \(3,\), expected \(5,\); load it without them"
        with pytest.raises(ValueError, match=message):
            load(folder, num_classes=5)
        with pytest.raises(ValueError, match="with map_location='cpu': "):
            load(folder, map_location="cpu")


def test_a_network_is_loaded_where_and_as_it_is_wanted(folder):
    for load in (load_model, PCENet.from_pretrained):
        found = {parameter.dtype for parameter in load(folder, device="cpu", dtype=torch.float64).parameters()}
        assert found == {torch.float64}
        assert next(load(folder, device="meta").parameters()).is_meta
