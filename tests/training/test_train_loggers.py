"""Weights & Biases, with a stand-in for its package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pcenet.training.config import TrainConfig
from pcenet.training.run import train

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

    modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
    modules["wandb"].__dict__.update(run=None, init=init, __spec__=SimpleNamespace(name="wandb"))
    modules["wandb.sdk.lib"].__dict__["RunDisabled"] = FakeRun
    modules["wandb.wandb_run"].__dict__["Run"] = FakeRun
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


def test_figures_go_to_wandb_too(wandb: SimpleNamespace, start: Start) -> None:
    folder = train(start(model="dense_nano", epochs=1, log="wandb"))
    (given,), (run,) = wandb.given, wandb.runs
    assert (given["project"], given["name"], given["resume"]) == ("pcenet", "run", "allow")
    assert given["id"] == (folder.logs / "wandb-id").read_text()
    assert given["dir"] == str(folder.logs)
    names = {name for values in run.logged for name in values}
    assert {"train/loss", "val/top1", "train/lr"} <= names
    assert run.options["model"] == "dense_nano"
    assert run.finished == 1
    assert list(folder.logs.glob("tensorboard/events*"))
    assert (folder.logs / "metrics.csv").is_file()


def test_a_missing_package_is_named_before_anything_is_written(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name))
    config = start(log="wandb")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pcenet\[wandb\]'"):
        train(config)
    assert not config.folder.exists()
