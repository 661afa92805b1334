"""The pages of experiments are what their script makes of the raw results; choices have images of their own."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest
import torch
import yaml

from pcenet.comparison.config import CompareConfig
from pcenet.nn import Grid, PCELayer, route
from pcenet.runs.config import TrainConfig

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report() -> ModuleType:
    return script("report")


@pytest.mark.parametrize("name", ["experiments.md", "trials.md"])
def test_the_pages_are_up_to_date(report: ModuleType, name: str) -> None:
    assert name in report.PAGES
    assert report.page(name) == (ROOT / "docs" / name).read_text(encoding="utf-8"), "run python experiments/report.py"


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


def test_routing_without_content_by_hand() -> None:
    content = script("routing_content")
    # Two images of two places: experts 0 and 2, 1 and 2.
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2], [1, 2, 3]])
    routing = route(logits, Grid(2, 1, 2))
    counts = {"a": torch.tensor([[5, 2, 4], [1, 3, 2]])}
    assert content.commonest(counts)("a", routing).tolist() == [[0], [1], [0], [1]]
    found = [content.of_another_image(seed)("a", routing).flatten().tolist() for seed in range(20)]
    assert {tuple(each) for each in found} == {(0, 2, 1, 2), (1, 2, 0, 2)}  # places stay, images change

    network = torch.nn.Sequential(PCELayer(3, 3, patch_size=2, num_experts=3, shortcut=False)).eval()
    images = torch.randn(6, 3, 2, 4)
    expected = torch.zeros(2, 3, dtype=torch.int64)
    for number, expert in enumerate(network[0].router(images).expert_ids.flatten().tolist()):
        expected[number % 2, expert] += 1
    assert content.choices_by_place(network, [images[:4], images[4:]])["0"].tolist() == expected.tolist()


def test_a_table_of_content_by_hand(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"as it is": 0.8, "commonest of its place": 0.75, "another image's": 0.7, "random": 0.1234}
    (tmp_path / "results").mkdir()
    found = [{"network": "n", "top1": scores, "commonest": {"a": 0.9, "b": 0.512}}]
    (tmp_path / "results" / "x.json").write_text(json.dumps(found))
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.content_table("x").splitlines()[2:] == ["| `n` | 80.00% | 75.00% | 70.00% | 12.34% | 90%, 51% |"]


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


def test_a_table_of_a_screening_by_hand(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"seed": seed, "loss": 1 + seed, "top1": 0.625, "train_loss": 0.5} for seed in (1, 0)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "screening-x.json").write_text(json.dumps([{"variant": "twin", "runs": runs}]))
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.screening_table("x").splitlines()[2:] == ["| twin | 1.000, 2.000 | 62.5%, 62.5% | 0.500, 0.500 |"]


def test_a_table_of_gains_by_hand(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paired by seed: 1, 2 and 3 points more have a mean of 2, and an interval of 4.303 / sqrt(3) to each side."""
    scores = {
        "dense_nano": (0.70, 0.71, 0.72),
        "pce_nano": (0.71, 0.73, 0.75),
        "experts_8": (0.73,),
        "position_only": (0.72, 0.70),
        "dense_nano_wide": (0.80,),
    }
    runs = [
        {"label": label, "seed": seed, "score": score, "val": {"images": 5000}}
        for label, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "comparison.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(report, "HERE", tmp_path)
    _, _, pce, eight, _, by_place, by_content, position, _, wide = report.gains_table("x").splitlines()
    assert eight.endswith("instead of 4 | +3.00 (1 seed) |")
    assert pce == "| PCE | +2.00 [-0.48, +4.48] |"
    assert by_place.endswith("| +0.50 (2 seeds) |")
    assert by_content.endswith("alone |  |")
    assert position.endswith("positions |  |")
    assert wide.endswith("| +10.00 (1 seed) |")


@pytest.mark.parametrize(
    ("name", "seeds", "networks"),
    [
        ("finals-cifar10", 5, {"pce_nano", "dense_nano_position", "dense_nano"}),
        ("variants-cifar10", 3, {"candidate", "experts_16"}),
        ("equal-time-cifar10", 3, {"dense_nano"}),
        ("equal-time-tiny-imagenet", 3, {"dense_nano"}),
        ("finals-camvid", 3, {"pce_unet_nano", "dense_unet_nano_position", "dense_unet_nano"}),
        (
            "tiny-imagenet",
            3,
            {"pce_nano", "experts_8", "experts_16", "dense_nano_position", "dense_nano", "dense_nano_wide"},
        ),
        (
            "controls-cifar10",
            3,
            {"pce_nano", "candidate", "candidate_by_place", "position_only", "content_only"}
            | {"dense_nano", "dense_nano_position", "dense_nano_condconv", "dense_nano_wide"},
        ),
        (
            "controls-camvid",
            3,
            {"pce_unet_nano", "dense_unet_nano", "dense_unet_nano_position", "dense_unet_nano_wide"}
            | {"position_only", "content_only"},
        ),
    ],
)
def test_the_recipes_are_valid_and_so_many_seeds_of_each_network(name: str, seeds: int, networks: set[str]) -> None:
    values = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
    own = {key: values.pop(key) for key in ("models", "seeds", "baseline", "variants") if key in values}
    config = CompareConfig(**own, recipe=TrainConfig(**values))
    assert [(run.label, run.seed) for run in config.runs] == [(m, s) for s in range(seeds) for m in own["models"]]
    assert set(own["models"]) == networks


def test_results_name_no_folder_of_the_machine_that_made_them() -> None:
    paths = [
        path for path in (ROOT / "experiments" / "results").rglob("*") if path.name in ("metrics.json", "config.yaml")
    ]
    assert len(paths) > 100
    named = [path for path in paths if Path(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]).is_absolute()]
    assert not named


def test_what_is_held_out_for_choices_is_of_the_training_images_and_takes_its_mask_along(tmp_path: Path) -> None:
    archive = tmp_path / "streets.zip"
    with ZipFile(archive, "w") as file:
        for split, name in (("train", "a_1"), ("train", "b_1"), ("val", "a_2")):
            file.writestr(f"streets/{split}/images/{name}.jpg", name)
            file.writestr(f"streets/{split}/masks/{name}.png", f"mask of {name}")
        file.writestr("streets/classes.txt", "sky")
    counts = script("dev").divide(archive, frozenset({"images/a_1"}), tmp_path / "out")
    assert counts == {"train": 2, "val": 2}
    files = {p.relative_to(tmp_path / "out").as_posix(): p.read_text() for p in (tmp_path / "out").rglob("*.*")}
    assert files == {
        "val/images/a_1.jpg": "a_1",
        "val/masks/a_1.png": "mask of a_1",
        "train/images/b_1.jpg": "b_1",
        "train/masks/b_1.png": "mask of b_1",
    }


@pytest.mark.parametrize(("name", "of_each"), [("cifar10", 500), ("tiny-imagenet-32", 25), ("camvid", 62)])
def test_the_lists_hold_out_as_many_of_each_class(name: str, of_each: int) -> None:
    listed = (ROOT / "experiments" / "dev" / f"{name}.txt").read_text(encoding="utf-8").split()
    assert len(set(listed)) == len(listed)
    assert set(Counter(line.partition("/")[0] for line in listed).values()) == {of_each}
