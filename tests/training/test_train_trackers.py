"""Weights & Biases with a stand-in for its package, and trackio itself, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.training.run import train
from pcenet.training.trackers import TensorBoard, Trackers, Trackio, WeightsAndBiases

Start = Callable[..., TrainConfig]


class FakeRun:
    """A run of wandb that remembers what it is told."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, **_: self.options.update(values))
        self.options: dict[str, Any] = {}
        self.finished = 0
        self.name = "fake"
        self.id = "fake"

    def log(self, values: dict[str, Any], **_: Any) -> None:
        self.logged.append(dict(values))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.counted_by = {name: step_metric}

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The package's stand-in: what its ``init`` was given, and the runs it made."""
    made = SimpleNamespace(given=[], runs=[])

    def init(**options: Any) -> FakeRun:
        made.given.append(options)
        made.runs.append(FakeRun())
        return made.runs[-1]

    module = ModuleType("wandb")
    module.__dict__.update(init=init, Image=lambda path: ("picture", path), __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


def test_figures_go_to_wandb_too(wandb: SimpleNamespace, start: Start) -> None:
    folder = train(start(model="dense_nano", epochs=1, log="wandb"))
    (given,), (run,) = wandb.given, wandb.runs
    assert (given["project"], given["name"], given["resume"]) == ("pcenet", "run", "allow")
    assert given["id"] == (folder.logs / "wandb-id").read_text()
    assert given["dir"] == str(folder.logs)
    names = {name for values in run.logged for name in values}
    assert {"train/loss", "val/top1", "train/lr", "step/loss", "step"} <= names
    assert run.counted_by == {"*": "step"}
    assert run.options["model"] == "dense_nano"
    assert run.finished == 1
    assert list(folder.logs.glob("tensorboard/events*"))
    assert (folder.logs / "metrics.csv").is_file()


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """trackio with an empty store of its own, no network, and nothing measured of this machine."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # the folder is read when it is imported
    return importlib.import_module("trackio")


def logged(name: str) -> list[dict[str, Any]]:
    """What trackio has stored of a run."""
    return importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("pcenet", name)


def test_figures_go_to_trackio_too(trackio: ModuleType, start: Start) -> None:
    folder = train(start(model="dense_nano", epochs=1, log="trackio"))
    name = f"run-{(folder.logs / 'trackio-id').read_text()[:6]}"
    (run,) = trackio.Api().runs("pcenet")
    assert run.name == name
    assert run.config["model"] == "dense_nano"
    (score,) = [row["val/top1"] for row in logged(name) if "val/top1" in row]
    assert score == pytest.approx(json.loads(folder.metrics.read_text())["val"]["top1"], abs=1e-6)
    assert list(folder.logs.glob("tensorboard/events*"))


def test_trackio_goes_on_with_a_run(trackio: ModuleType, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    for step in (1, 2):
        tracker = Trackio(folder, TrainConfig(data="digits"))
        tracker.log({"loss": 1 / step}, step)
        tracker.close()
    (run,) = trackio.Api().runs("pcenet")
    assert [(row["step"], row["loss"]) for row in logged(run.name)] == [(1, 1.0), (2, 0.5)]


@pytest.fixture
def pictures_folder(tmp_path: Path) -> Path:
    """Two pictures of different sizes, of one colour each."""
    folder = tmp_path / "run" / "pictures"
    folder.mkdir(parents=True)
    (folder.parent / "logs").mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(folder / "curves.png")
    Image.new("RGBA", (3, 5), (0, 0, 255, 255)).save(folder / "confusion.png")
    return folder


def test_pictures_go_to_tensorboard(pictures_folder: Path) -> None:
    folder = RunFolder(pictures_folder.parent)
    trackers = Trackers({"TensorBoard": lambda: TensorBoard(folder, 1)})
    for path in pictures_folder.glob("*.png"):
        trackers.show(path, 7)
    trackers.close()
    events = EventAccumulator(str(folder.logs / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["pictures/confusion", "pictures/curves"]
    found = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        pixel = Image.open(io.BytesIO(event.encoded_image_string)).getpixel((0, 0))
        found[tag] = (event.step, event.width, event.height, pixel)
    assert found == {"pictures/curves": (7, 6, 4, (255, 0, 0)), "pictures/confusion": (7, 3, 5, (0, 0, 255))}


def test_pictures_go_to_wandb(wandb: SimpleNamespace, pictures_folder: Path) -> None:
    trackers = Trackers(
        {"W&B": lambda: WeightsAndBiases(RunFolder(pictures_folder.parent), TrainConfig(data="digits"))}
    )
    path = pictures_folder / "curves.png"
    trackers.show(path, 7)
    (run,) = wandb.runs
    assert run.logged == [{"pictures/curves": ("picture", str(path)), "step": 7}]


def test_pictures_go_to_trackio(trackio: ModuleType, pictures_folder: Path) -> None:
    tracker = Trackio(RunFolder(pictures_folder.parent), TrainConfig(data="digits"))
    tracker.show("pictures/curves", pictures_folder / "curves.png", 7)
    tracker.close()
    (run,) = trackio.Api().runs("pcenet")
    (row,) = logged(run.name)
    assert row["step"] == 7
    assert row["pictures/curves"]["_type"] == "trackio.image"


def test_a_picture_that_cannot_be_shown_is_a_warning(pictures_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures_folder / "broken.png").write_bytes(b"no image")
    folder = RunFolder(pictures_folder.parent)
    trackers = Trackers({"TensorBoard": lambda: TensorBoard(folder, 1)})
    for name in ("broken", "curves"):
        trackers.show(pictures_folder / f"{name}.png", 7)
    assert len(caplog.messages) == 1
    assert "TensorBoard failed to show a picture" in caplog.messages[0]
    trackers.log({"loss": 0.5}, 8)  # the figures go on
    trackers.close()
    events = EventAccumulator(str(folder.logs / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == []
    assert [event.value for event in events.Scalars("loss")] == [0.5]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_written(
    start: Start, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name))
    config = start(log=package)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'pcenet\[{package}\]'"):
        train(config)
    assert not config.folder.exists()
