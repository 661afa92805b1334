from __future__ import annotations

import re
from typing import Any

import pytest

from pcenet.training.config import EvalConfig, TrainConfig, options_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1, got 1.0"),
        ({"seed": 2**32}, "seed must be below 4294967296, got 4294967296"),
        ({"precision": "fp23"}, "precision 'fp23' is not one of auto, bf16, fp32; did you mean 'fp32'?"),
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
