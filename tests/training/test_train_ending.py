"""Runs that end early: without progress, without time; and how they are resumed."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runs.rules import duration
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.loop import Trainer
from pcenet.training.run import train

Start = Callable[..., TrainConfig]

SCORES = [0.3, 0.5, 0.5, 0.4, 0.9]  # the best is that of epoch 2; two epochs without a better one end after epoch 4


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that reports `SCORES`, whatever the network does."""
    original = Trainer.validate

    def validate(self: Trainer) -> dict[str, float]:
        return original(self) | {"val/top1": SCORES[self.state.epoch]}

    monkeypatch.setattr(Trainer, "validate", validate)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every training step takes a minute and all else no time."""
    now = [0.0]
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        now[0] += 60
        return original(self, batch, number)

    monkeypatch.setattr(Trainer, "batch_loss", batch_loss)
    monkeypatch.setattr(
        "pcenet.training.loop.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    )


def epochs(folder: RunFolder) -> list[tuple[int, int]]:
    with open(folder.logs / "metrics.csv", newline="") as file:
        return [(int(row["epoch"]), int(row["step"])) for row in csv.DictReader(file)]


def weights(folder: RunFolder) -> bytes:
    return (folder.model / "model.safetensors").read_bytes()


def interrupted(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until Ctrl-C at the beginning of an optimiser step."""
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        if self.state.step == step:
            raise KeyboardInterrupt
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "batch_loss", batch_loss)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def without_its_summary(folder: RunFolder, config: TrainConfig) -> None:
    """A copy of a run that died after training."""
    shutil.copytree(folder.path, config.folder)
    (config.folder / "metrics.json").unlink()
    shutil.rmtree(config.folder / "model")


@pytest.mark.usefixtures("scores")
def test_without_progress_a_run_ends_and_stays_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"model": "dense_nano", "epochs": 5, "early_stopping": 2}
    whole = train(start("whole", **options))
    assert epochs(whole) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    metrics = json.loads(whole.metrics.read_text())
    assert (metrics["epochs"], metrics["steps"], metrics["stopped"]) == (4, 12, "early_stopping")
    assert metrics["best"] == {"epoch": 2, "top1": pytest.approx(0.5)}
    assert metrics["weights_of_epoch"] == 2
    said = capsys.readouterr().out
    assert "stopped by early_stopping in epoch 4 of 5; the weights are those of epoch 2" in said
    best = read_checkpoint(whole.checkpoint(6))["averaged"]
    assert_close(load_file(whole.model / "model.safetensors"), {name: best[name] for name in best}, rtol=0, atol=0)

    without_its_summary(whole, start("died"))
    completed = train(start("died", resume="auto", **options))
    assert epochs(completed) == epochs(whole)
    assert weights(completed) == weights(whole)
    assert json.loads(completed.metrics.read_text()) == metrics

    interrupted(start("broken", **options), 9, monkeypatch)
    resumed = train(start("broken", resume="auto", **options))
    assert epochs(resumed) == epochs(whole)
    assert weights(resumed) == weights(whole)

    # Gone on with in another folder, where the best epoch has no checkpoint.
    moved = train(start("moved", resume=str(whole.checkpoint(9)), **options))
    assert json.loads(moved.metrics.read_text())["weights_of_epoch"] == 4
    last = read_checkpoint(moved.checkpoint(12))["averaged"]
    assert_close(load_file(moved.model / "model.safetensors"), {name: last[name] for name in last}, rtol=0, atol=0)

    new = start("new", resume=str(whole.steps[-1]), **options)
    with pytest.raises(ValueError, match=r"step-00000012 was stopped by early_stopping in epoch 4"):
        train(new)
    assert not new.folder.exists()


@pytest.mark.usefixtures("clock")
def test_without_time_a_run_ends_within_an_epoch_and_is_finished(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"model": "dense_nano", "epochs": 5, "max_time": "3.5"}
    whole = train(start("whole", **options))
    assert epochs(whole) == [(1, 3), (2, 4)]  # the fourth minute is over after the fourth step
    metrics = json.loads(whole.metrics.read_text())
    assert (metrics["epochs"], metrics["steps"], metrics["stopped"]) == (2, 4, "max_time")
    assert metrics["val"]["images"] == 12
    before = weights(whole)
    train(start("whole", resume="auto", **options))
    assert weights(whole) == before

    without_its_summary(whole, start("died"))
    completed = train(start("died", resume="auto", **options))
    assert weights(completed) == before
    assert json.loads(completed.metrics.read_text()) == metrics

    interrupted(start("broken", **options), 3, monkeypatch)
    resumed = train(start("broken", resume="auto", **options))  # three minutes lie behind
    assert epochs(resumed) == epochs(whole)
    assert weights(resumed) == before


def test_a_time_limit_that_is_not_reached_changes_nothing(start: Start) -> None:
    options: dict[str, Any] = {"model": "dense_nano", "epochs": 1}
    plain, limited = (
        train(start(name, **options, **more))
        for name, more in (("plain", {}), ("limited", {"max_time": "10:00:00", "early_stopping": 50}))
    )
    assert weights(plain) == weights(limited)
    assert json.loads(limited.metrics.read_text())["stopped"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", timedelta(minutes=90)),
        ("0.5", timedelta(seconds=30)),
        ("5:30", timedelta(minutes=5, seconds=30)),
        ("1:30:00", timedelta(minutes=90)),
        ("02:01:00:00", timedelta(days=2, hours=1)),
    ],
)
def test_durations(text: str, expected: timedelta) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "soon", "-3", "0", "00:00", "1:2", "1:00:00:00:00", "1.5:00", 13 * "9", 500 * "9", f"{5000 * '9'}:00:00:00"],
)
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"max_time must be a time such as .* got '{re.escape(text)}'"):
        TrainConfig(max_time=text)
