"""The page of experiments is what its script makes of the raw results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from pcenet.comparison.config import CompareConfig
from pcenet.runs.config import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "experiments" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(report: ModuleType) -> None:
    assert report.page() == (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8"), (
        "run python experiments/report.py"
    )


def test_a_table_of_trials_by_hand(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = {"label": "twin", "change": "none", "score": 0.5, "val": {"miou": 0.5, "loss": 1.25}, "train_loss": 1.0}
    layers = {
        "a": {"max_min": 1.5, "drop_rate": 0.015},
        "b": {"max_min": None, "drop_rate": 0.25},
    }
    trial = {"label": "pce", "change": "all", "score": 0.48, "val": {"miou": 0.48, "loss": 1}, "train_loss": 0.5}
    (tmp_path / "results" / "trials").mkdir(parents=True)
    trials = [twin | {"router": {}}, trial | {"router": layers}]
    (tmp_path / "results" / "trials" / "x.json").write_text(json.dumps(trials))
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.trials_table("x").splitlines()[2:] == [
        "| twin: none | 50.00% |  | 1.000 | 1.250 |  |  |",
        "| pce: all | 48.00% | -2.00 | 0.500 | 1.000 | dead experts | 25.0% |",
    ]


def test_a_table_of_routers_by_hand(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    even = {"load": [0.6, 0.4], "entropy": 0.971, "max_min": 1.5, "drop_rate": 0.0, "dead": 0, "dead_experts": []}
    dead = {"load": [1.0, 0.0], "entropy": 0.0, "max_min": None, "drop_rate": 0.0, "dead": 1, "dead_experts": [1]}
    (tmp_path / "results" / "evaluation").mkdir(parents=True)
    path = tmp_path / "results" / "evaluation" / "x.json"
    path.write_text(json.dumps({"router": {"a.body": even, "b.body": dead}}))
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.routers_table("x").splitlines()[2:] == [
        "| a | 60.0% 40.0% | 0.971 | 1.50 | 0 |",
        "| b | 100.0% 0.0% | 0.000 | n/a: dead experts | 1 |",
    ]


@pytest.mark.parametrize("name", ["cifar10", "camvid"])
def test_the_recipes_are_valid_and_three_seeds_of_model_and_twin(name: str) -> None:
    values = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
    own = {key: values.pop(key) for key in ("models", "seeds")}
    config = CompareConfig(**own, recipe=TrainConfig(**values))
    assert [(run.label, run.seed) for run in config.runs] == [(m, s) for s in range(3) for m in own["models"]]
    assert [m.partition("_")[0] for m in own["models"]] == ["pce", "dense"]
