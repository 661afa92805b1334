"""`bundle_weights.py`: what it copies, what it writes on the card, what it refuses; and `keep_weights.py`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import keep_weights
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from pcenet.catalogue import bundled
from pcenet.models import create_network, load_model
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder

SCRIPT = Path(__file__).parents[1] / "experiments" / "bundle_weights.py"
SCENE = ["sky", "road", "tree"]
VAL = {
    "pce_nano": {"images": 5000, "loss": 0.5, "top1": 0.83456},
    "pce_unet_nano": {"images": 101, "miou": 0.40926, "iou": dict.fromkeys(SCENE, 0.5)},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle_weights", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., RunFolder]:
    """A run folder as `pcenet train` leaves it, of a network that nothing has trained."""

    def make(network: str = "pce_nano", class_names: list[str] | None = SCENE, **arguments: Any) -> RunFolder:
        run = RunFolder(tmp_path / "run")
        options: dict[str, Any] = {"task": "classify" if network == "pce_nano" else "segment", "classes": None}
        if network != "pce_nano":
            options["classes"] = str(tmp_path / "classes.txt")
        environment = {
            "pcenet": "0.1.0", "versions": {"torch": "2.9.9", "timm": "1.0.99"}, "precision": "fp32", "device": "cpu",
        }  # fmt: skip
        data = str(tmp_path / "pets.zip")
        run.create(
            TrainConfig(model=network, data=data, out=str(run.path), epochs=7, lr=0.0123, **options), environment, None
        )
        model = create_network(network, num_classes=3, **arguments)
        model.class_names = class_names
        model.save_pretrained(run.model)
        run.metrics.write_text(json.dumps({"epochs": 6, "val": VAL[network]}))
        return run

    return make


@pytest.mark.parametrize(
    ("network", "score"), [("pce_nano", "top-1 83.46% of 5000 images"), ("pce_unet_nano", "mIoU 40.93% of 101 images")]
)
def test_a_runs_network_becomes_part_of_the_package(
    bundle: Any, finished: Callable[..., RunFolder], script: ModuleType, tmp_path: Path, network: str, score: str
) -> None:
    run, name = finished(network), f"pets/{network}"
    for _ in range(2):  # the second time it replaces what is there
        script.main([str(run.path), name])
    assert bundled() == [name]
    folder = tmp_path / "weights" / name
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (run.model / file).read_bytes()
    assert load_model(name).class_names == SCENE
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    for words in (score, "| data | pets.zip |", "sky, road, tree", "| epochs | 6 |", "torch 2.9.9", f'"{name}"'):
        assert words in card.text, words
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["model"], recipe["data"], recipe["epochs"], recipe["lr"]) == (network, "pets.zip", 7, 0.0123)
    TrainConfig(**recipe)
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_weights_of_half_the_size(
    bundle: Any, finished: Callable[..., RunFolder], script: ModuleType, tmp_path: Path
) -> None:
    run, name = finished(), "pets/pce_nano"
    script.main([str(run.path), name, "--half"])
    stored = tmp_path / "weights" / name / "model.safetensors"
    assert 0.5 < stored.stat().st_size / (run.model / "model.safetensors").stat().st_size < 0.55
    for key, tensor in load_model(name).state_dict().items():
        whole = load_model(run.model).state_dict()[key]
        assert tensor.dtype == whole.dtype
        assert torch.equal(tensor, whole.half().float() if whole.ndim >= 4 else whole)


def test_networks_of_all_runs_are_kept(finished: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = finished()
    unfinished = RunFolder(tmp_path / "b-0")
    unfinished.path.mkdir()
    for _ in range(2):
        assert keep_weights.keep(tmp_path, tmp_path / "kept") == ["run"]
    kept = tmp_path / "kept" / "run"
    assert {path.name for path in kept.iterdir()} == {"model.safetensors", "config.json"}
    for key, tensor in load_model(kept).state_dict().items():
        whole = load_model(run.model).state_dict()[key]
        assert torch.equal(tensor, whole.half().float() if whole.ndim >= 4 else whole)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_no_run_to_keep(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        keep_weights.main([str(tmp_path / folder), str(tmp_path / "kept")])
    assert "has no finished run with its model/" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_what_it_refuses(
    bundle: Any, finished: Callable[..., RunFolder], script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run: RunFolder, name: str, message: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            script.main([str(run.path), name])
        assert message in capsys.readouterr().err
        assert bundled() == []

    run = finished(border="zero")
    refused(run, "pets/pce_nano", "border is zero, pce_nano has exchange")
    run = finished(drop_rate=0.1)
    refused(run, "pets/pce_nano", "drop_rate is 0.1, pce_nano has 0.0")
    run = finished(class_names=None)
    refused(run, "pets/pce_nano", "names no classes")
    run = finished()
    refused(run, "pets/dense_nano", "holds a pce_nano, not a dense_nano")
    for name in ("pce_nano", "pets/", "/pce_nano", "a/pets/pce_nano"):
        refused(run, name, "must be DATA/NETWORK")
    config = json.loads((run.model / "config.json").read_text())
    del config["model_args"]["gate"]
    (run.model / "config.json").write_text(json.dumps(config))
    refused(run, "pets/pce_nano", "gate is nothing, pce_nano has prob")
    run = finished()
    run.metrics.unlink()
    refused(run, "pets/pce_nano", "is no finished run")


def test_files_of_six_megabytes_are_refused(
    bundle: Any, finished: Callable[..., RunFolder], script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    notes = run.model / "notes.bin"
    notes.write_bytes(bytes(6_000_000))
    with pytest.raises(SystemExit, match="2"):
        script.main([str(run.path), "pets/pce_nano"])
    assert "notes.bin has 6000000 bytes, a bundled file at most 5999999" in capsys.readouterr().err
    notes.write_bytes(bytes(5_999_999))
    script.main([str(run.path), "pets/pce_nano"])
    assert bundled() == ["pets/pce_nano"]
