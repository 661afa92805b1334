from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from pcenet.comparison.config import CompareConfig
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.options import options_of
from pcenet.tasks.base import mirrors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1, got 1.0"),
        ({"seed": 2**32}, "seed must be below 4294967296, got 4294967296"),
        ({"precision": "fp23"}, "precision 'fp23' is not one of auto, bf16, fp16, fp32, tf32; did you mean 'fp32'?"),
        ({"augment": "corp"}, "did you mean 'crop'?"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**changes)


@pytest.mark.parametrize("config_class", [TrainConfig, EvalConfig])
def test_every_field_explains_itself(config_class: type) -> None:
    assert all(len(option.help) > 10 for _, option in options_of(config_class).values())


def test_run_folder_is_named_after_model_data_and_seed() -> None:
    assert str(TrainConfig(data="some/where/birds.zip", seed=3).folder) == "runs/pce_nano-birds-3"
    assert str(TrainConfig(out="elsewhere").folder) == "elsewhere"


def test_values_are_written_as_a_file_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"depths": (1, np.int64(2)), "more": {"width": np.float32(0.5)}}
    config = TrainConfig(
        lr=np.float64(0.25), epochs=np.int64(3), model_args=given, out="~/runs/a", data=Path("~/b.zip")
    )
    expected = {"lr": 0.25, "epochs": 3, "out": "/home/somebody/runs/a", "data": "/home/somebody/b.zip"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_args == {"depths": [1, 2], "more": {"width": 0.5}}
    kinds = (config.lr, config.epochs, config.model_args["depths"][1], config.model_args["more"]["width"])
    assert [type(value) for value in kinds] == [float, int, int, float]
    assert yaml.safe_load(yaml.safe_dump(asdict(config))) == asdict(config)


def test_a_link_to_itself_has_a_folder_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert str(TrainConfig(data=str(tmp_path / "loop")).folder) == "runs/pce_nano-loop-0"
    assert (
        str(CompareConfig(["pce_nano"], recipe=TrainConfig(data=str(tmp_path / "loop"))).folder) == "runs/compare-loop"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 0.2, "task": "segment"}, "mixup is for classification: leave it out to segment"),
        ({"cutmix": 0.2, "task": "segment", "batch_size": 1}, "cutmix mixes the images of a batch"),
        ({"random_erasing": 0.2, "task": "segment"}, "random_erasing is for classification"),
        ({"horizontal_flip": True, "augment": "none"}, "horizontal_flip has no effect with augment 'none'"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"data": 5}, "data must be text, got 5"),
        ({"pretrained": 1}, "pretrained must be true or false, got 1"),
        ({"model_args": ["border"]}, "model_args must be a mapping, got ['border']"),
        ({"classes": 3}, "classes must be a list or text or null, got 3"),
        ({"class_weights": "median"}, "class_weights is for segmentation: leave it out to classify"),
        ({"min_scale": 0.8}, "min_scale is for segmentation"),
        ({"max_scale": 1.5}, "max_scale is for segmentation"),
        ({"jitter": 0.0}, "jitter is for segmentation"),
        ({"classes": ["a", "b"]}, "classes is for segmentation"),
        ({"ignore_index": 0}, "ignore_index is for segmentation"),
        ({"mixup": 0.2, "batch_size": 1}, "mixup mixes the images of a batch, so batch_size must be at least 2, got 1"),
        ({"random_erasing": 1.5}, "random_erasing must be at most 1, got 1.5"),
        ({"temperature_epochs": 3.0}, "temperature_epochs 3 has no effect without temperature: give both, or neither"),
        ({"balance_epochs": 3.0}, "balance_epochs 3 has no effect without balance_start"),
        ({"router_noise_epochs": 0.5}, "router_noise_epochs 0.5 has no effect without router_noise"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"schedule": "cosinus"}, "did you mean 'cosine'?"),
        ({"overfit": 8, "mixup": 0.2}, "mixup changes the images, and overfit learns them as they are"),
        ({"overfit": 8, "random_erasing": 0.2}, "random_erasing changes the images, and overfit"),
        ({"overfit": 8, "augment": "crop"}, "augment 'crop' changes the images, and overfit"),
        ({"dry_run": True, "find": "lr"}, "dry_run and find 'lr' exclude each other"),
        ({"find": "batchsize"}, "did you mean 'batch-size'?"),
    ],
)
def test_options_that_do_not_go_together_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**changes)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_mirrored_is_for_the_user_to_say(allowed: bool) -> None:
    source = SimpleNamespace(horizontal_flip=allowed)
    found = [mirrors(TrainConfig(horizontal_flip=asked), source) for asked in (None, True, False)]
    assert found == [allowed, True, False]
