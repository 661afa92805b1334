"""The report of results that were written by hand, and of those that are kept in this repository."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from pcenet.cli import main
from pcenet.comparison.config import CompareConfig
from pcenet.comparison.report import make_report, write_report
from pcenet.comparison.results import read_results
from pcenet.comparison.run import status
from pcenet.comparison.tables import difference_text, label_sheet, router_sheet, run_sheet, warnings
from pcenet.runs.config import TrainConfig

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
RECIPE = TrainConfig(data="pictures.zip", epochs=2, batch_size=8, precision="fp32", input_size=32)
COST = {"parameters": 3_000_000, "active_parameters": 1_000_000, "multiply_adds": 2_500_000}


def keep(
    folder: Path,
    model: str,
    seed: int,
    score: float,
    curve: Sequence[tuple[float, float]] = ((0.25, 0.5),),
    router: Mapping[str, Any] | None = None,
    dropped: float = 0.0,
    machine: str = "One",
    seconds: float = 2.0,
    images: int = 200,
    **changes: Any,
) -> None:
    """Write what is kept of a finished run; ``curve`` holds train and val score of each epoch."""
    run = folder / f"{model}-{seed}"
    run.mkdir(parents=True)
    config = {"model": model, "seed": seed, "data": "pictures.zip", "epochs": 2, "batch_size": 8, "precision": "fp32"}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"input_size": 32} | changes))
    environment = {"processor": machine, "device": "cpu", "threads": 3, "precision": "fp32", "python": "3.11"}
    (run / "environment.json").write_text(
        json.dumps(environment | {"pcenet": "0.1", "versions": {"torch": "2.6"}}), encoding="utf-8"
    )
    best = max(range(len(curve)), key=lambda index: curve[index][1])
    metrics = {
        "seed": seed,
        "epochs": len(curve),
        "stopped": None,
        "val": {"images": images, "loss": 1.0, "top1": score},
        "best": {"epoch": best + 1, "top1": curve[best][1]},
        "epoch_seconds": seconds,
        "images_per_second": 9.0,
        "complexity": COST,
        "val_router": router or {},
        "train_router": {name: {"drop_rate": dropped} for name in router or {}},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    with open(run / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "step", "train/top1", "val/top1", "train/task_loss", "val/loss"])
        table.writerows([n, 3 * n, train, val, 1.5, "nan"] for n, (train, val) in enumerate(curve, start=1))


def layer(entropy: float, max_min: float | None, dead: list[int]) -> dict[str, Any]:
    values = {"load": [0.5, 0.5], "entropy": entropy, "max_min": max_min, "drop_rate": 0.0}
    return values | {"dead": len(dead), "dead_experts": dead}


@pytest.fixture
def kept(tmp_path: Path) -> CompareConfig:
    """Three seeds of a network, 1, 2 and 3 points ahead of its twin; one run is still to be made."""
    folder = tmp_path / "results"
    router = {"a": layer(0.75, 2.75, []), "b": layer(0.5, 2.0, [])}
    keep(folder, "pce_nano", 0, 0.71, [(0.1, 0.2), (0.3, 0.4)], router, 0.25, seconds=2.0)
    keep(folder, "pce_nano", 1, 0.72, [(0.3, 0.8), (0.5, 0.6)], {"a": layer(0.9, 1.5, [])}, 0.5, seconds=3.0)
    keep(folder, "pce_nano", 2, 0.73, router={"a": layer(0.95, 1.25, [])}, machine="Two", seconds=7.0)
    for seed in range(3):
        keep(folder, "dense_nano", seed, 0.7, seconds=1.0)
    keep(folder, "dense_nano", 9, 0.1)  # of no seed that is asked for
    keep(folder, "pce_tiny", 0, 0.4, router={"a": layer(0.0, None, [1]), "b": layer(0.3, 9.0, [])})
    (folder / "other").mkdir()
    return CompareConfig(["pce_nano", "dense_nano", "pce_tiny"], 3, out=str(folder), recipe=RECIPE)


def test_the_summary_of_each_label(kept: CompareConfig) -> None:
    report = make_report(kept, "dense_nano")
    ours, twin, tiny = report["summary"]
    assert [row["label"] for row in report["summary"]] == ["pce_nano", "dense_nano", "pce_tiny"]
    assert ours["mean"] == pytest.approx(0.72)
    assert ours["deviation"] == pytest.approx(0.01)
    assert ours["difference"]["by_seed"] == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    assert ours["difference"]["mean"] == pytest.approx(0.02)
    assert ours["difference"]["low"] == pytest.approx(0.02 - 0.024842, abs=1e-6)
    assert ours["difference"]["high"] == pytest.approx(0.02 + 0.024842, abs=1e-6)
    assert ours["epoch_seconds"] == 4
    assert ours["complexity"] == COST
    assert ours["routers"] == {"val": {"entropy": 0.5, "max_min": 2.75, "dead": 0}, "train": {"drop_rate": 0.5}}
    assert (twin["seeds"], twin["difference"], twin["routers"]) == ([0, 1, 2], None, None)
    assert (tiny["deviation"], tiny["difference"]["low"]) == (None, None)
    assert tiny["difference"]["mean"] == pytest.approx(-0.3)
    assert tiny["routers"] == {"val": {"entropy": 0.0, "max_min": None, "dead": 1}, "train": {"drop_rate": 0.0}}


def test_the_runs_and_what_they_were_made_with(kept: CompareConfig) -> None:
    report = make_report(kept, "dense_nano")
    assert (report["planned"], len(report["runs"])) == (9, 7)
    assert [(run["label"], run["seed"]) for run in report["runs"]][:4] == [
        ("pce_nano", 0),
        ("dense_nano", 0),
        ("pce_tiny", 0),
        ("pce_nano", 1),
    ]
    first = report["runs"][0]
    assert (first["score"], first["model"], first["epochs"]) == (0.71, "pce_nano", 2)
    assert first["best"] == {"epoch": 2, "top1": 0.4}
    assert first["curve"] == [
        {"epoch": 1, "train_score": 0.1, "val_score": 0.2, "train_loss": 1.5, "val_loss": None},
        {"epoch": 2, "train_score": 0.3, "val_score": 0.4, "train_loss": 1.5, "val_loss": None},
    ]
    assert [(machine["processor"], len(machine["runs"])) for machine in report["environments"]] == [
        ("One", 6),
        ("Two", 1),
    ]
    assert report["environments"][1]["runs"] == ["pce_nano-2"]
    assert report["recipe"]["epochs"] == 2
    assert not {"seed", "out", "resume"} & set(report["recipe"])


def test_the_tables(kept: CompareConfig) -> None:
    report = make_report(kept, "dense_nano")
    costs = ["2.5 M", "3.00 M", "1.00 M"]
    assert label_sheet(report).rows == [
        ["pce_nano", "3", "72.0% ± 1.0", "+2.0 [-0.5, +4.5]", *costs, "4.0"],
        ["dense_nano", "3", "70.0% ± 0.0", "", *costs, "1.0"],
        ["pce_tiny", "1", "40.0%", "-30.0", *costs, "2.0"],
    ]
    assert label_sheet(report).title == "against dense_nano, 200 validation images"
    assert "difference, points" not in label_sheet(make_report(kept, None)).header
    assert router_sheet([row for row in report["summary"] if row["routers"]]).rows == [
        ["pce_nano", "0.500", "2.75", "0", "50.0%"],
        ["pce_tiny", "0.000", "n/a: dead experts", "1", "0.0%"],
    ]
    assert run_sheet(report).rows[3] == ["pce_nano", "1", "72.0%", "80.0% (1)", "2", "3.0"]


def test_a_run_whose_routers_are_not_healthy_is_named(kept: CompareConfig, caplog: pytest.LogCaptureFixture) -> None:
    words = (
        "pce_tiny-0: routers at evaluation: 1 of 4 experts gets no patch at all (a: expert 1), and the busiest expert"
    )
    write_report(kept, "dense_nano")
    (line,) = [line for line in (kept.folder / "comparison.md").read_text().splitlines() if "**Warning:**" in line]
    assert words in line
    status(kept)
    assert [words in message for message in caplog.messages] == [True]


def test_runs_that_were_validated_on_different_images_are_named(tmp_path: Path) -> None:
    keep(tmp_path, "pce_nano", 0, 0.5, images=200)
    keep(tmp_path, "dense_nano", 0, 0.4, images=80)
    report = make_report(CompareConfig(["pce_nano", "dense_nano"], 1, out=str(tmp_path), recipe=RECIPE), "dense_nano")
    (line,) = warnings(report)
    assert line.endswith("scores cannot be compared (80: dense_nano-0; 200: pce_nano-0)")


def test_a_run_without_a_step_in_its_last_epoch_has_no_share_of_dropped_patches(tmp_path: Path) -> None:
    keep(tmp_path, "pce_nano", 0, 0.5, router={"a": layer(0.5, 2.0, [])})
    path = tmp_path / "pce_nano-0" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_router": {"a": {"bias_spread": 1.0}}}))
    report = make_report(CompareConfig(["pce_nano"], 1, out=str(tmp_path), recipe=RECIPE), None)
    assert router_sheet(report["summary"]).rows == [["pce_nano", "0.500", "2.00", "0", "n/a"]]


def test_runs_of_a_version_that_counted_in_training_have_no_health(kept: CompareConfig) -> None:
    path = kept.folder / "pce_nano-1" / "metrics.json"
    metrics = json.loads(path.read_text())
    even = {"load": [0.5, 0.5], "entropy": 1.0, "max_min": 1.0, "drop_rate": 0.75, "dead": []}
    del metrics["val_router"], metrics["train_router"]
    path.write_text(json.dumps(metrics | {"router": {"a": even}}))
    report = make_report(kept, "dense_nano")
    assert report["summary"][0]["routers"] == {"val": None, "train": {"drop_rate": 0.75}}
    assert router_sheet(report["summary"][:1]).rows == [["pce_nano", "n/a", "n/a", "n/a", "75.0%"]]


def test_few_images_get_no_digits_that_they_do_not_support(tmp_path: Path) -> None:
    for model, seed, score in (("pce_nano", 0, 7 / 12), ("pce_nano", 1, 9 / 12), ("dense_nano", 0, 6 / 12)):
        keep(tmp_path, model, seed, score, images=12)
    report = make_report(CompareConfig(["pce_nano", "dense_nano"], 2, out=str(tmp_path), recipe=RECIPE), "dense_nano")
    assert [row[2:4] for row in label_sheet(report).rows] == [["67% ± 12", "+8"], ["50%", ""]]
    assert [row[2] for row in run_sheet(report).rows] == ["58%", "50%", "75%"]


def test_the_files(kept: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in kept.folder.iterdir()}
    report = write_report(kept, "dense_nano")
    assert {path.name for path in kept.folder.iterdir()} - before == {
        "comparison.json",
        "comparison.md",
        "curves.png",
        ".lock",
    }
    # JSON has no numbers as names: seeds become texts.
    assert json.loads((kept.folder / "comparison.json").read_text()) == json.loads(json.dumps(report))
    text = (kept.folder / "comparison.md").read_text()
    row = "| pce_nano | 3 | 72.0% ± 1.0 | +2.0 [-0.5, +4.5] | 2.5 M | 3.00 M | 1.00 M | 4.0 |"
    assert row in text.splitlines()
    assert "7 of 9 runs are finished" in text
    assert "pce_nano-2: Two, 3 threads, fp32; torch 2.6, pcenet 0.1, Python 3.11" in text
    with Image.open(kept.folder / "curves.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0, 0x9E, 0x73)} <= {colour for _, colour in colours or []}


def test_without_matplotlib_there_are_no_curves(
    kept: CompareConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(kept, "dense_nano")
    assert (kept.folder / "comparison.md").is_file()
    assert not (kept.folder / "curves.png").exists()
    assert len(caplog.messages) == 1
    assert "pip install 'pcenet[plot]'" in caplog.messages[0]


def test_without_a_result_nothing_is_written(tmp_path: Path) -> None:
    assert write_report(CompareConfig(["pce_nano"], out=str(tmp_path)), None)["runs"] == []
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_a_comparison_is_shown_and_nothing_written(
    kept: CompareConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = kept.folder / "pce_tiny-2"
    (begun / "logs").mkdir(parents=True)
    (begun / "logs" / "metrics.csv").write_text("epoch,val/loss\n1,0.5\n")
    files = sorted(kept.folder.rglob("*"))
    status(kept)
    assert sorted(kept.folder.rglob("*")) == files
    shown = capsys.readouterr().out
    assert "7 of 9 runs are finished" in shown
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines()]
    assert ["pce_tiny", "1", "not begun"] in cells
    assert ["pce_tiny", "2", "stopped after 1 of 2 epochs"] in cells
    assert "+2.0 [-0.5, +4.5]" in shown


def test_a_result_may_come_from_elsewhere_but_not_from_other_options(tmp_path: Path) -> None:
    """The data lay elsewhere and the machine chose the precision: that is the recipe all the same."""
    recipe = TrainConfig(data="here/pictures.zip", epochs=2, batch_size=8)
    config = CompareConfig(["pce_nano"], 1, out=str(tmp_path), recipe=recipe)
    keep(tmp_path, "pce_nano", 0, 0.5, data="there/pictures.zip", precision="bf16")
    assert len(status(config)["runs"]) == 1
    for changes, message in (
        ({"data": "there/other.zip"}, r"data 'there/other.zip' -> 'here/pictures.zip'"),
        ({"lr": 0.5}, r"lr 0\.5 -> 0\.003"),
    ):
        (tmp_path / "pce_nano-0").rename(tmp_path / f"was-{len(list(tmp_path.iterdir()))}")
        keep(tmp_path, "pce_nano", 0, 0.5, **changes)
        with pytest.raises(ValueError, match=rf"pce_nano-0 was started with other options .*{message}.*another label"):
            status(config)


def test_a_result_of_data_of_the_same_name_beside_the_present_ones_is_another(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "images").mkdir(parents=True)
    (tmp_path / "c").symlink_to("a")
    there, here = str(tmp_path / "a" / "images"), str(tmp_path / "b" / "images")
    keep(tmp_path / "runs", "pce_nano", 0, 0.5, data=there)
    for data in (here, str(tmp_path / "c" / "images")):
        recipe = TrainConfig(data=data, epochs=2, batch_size=8, precision="fp32", input_size=32)
        config = CompareConfig(["pce_nano"], 1, out=str(tmp_path / "runs"), recipe=recipe)
        if data == here:
            with pytest.raises(ValueError, match=f"data '{there}' -> '{here}'"):
                status(config)
        else:
            assert len(status(config)["runs"]) == 1


FIFO = "a pipe, from which nothing comes"
LAYER = {"load": [1.0], "entropy": 0.0, "max_min": None, "drop_rate": 0.0, "dead": []}
WRONG_FIGURES = [
    (("val", "top1"), "x"),
    (("val", "top1"), float("nan")),
    (("val", "images"), -1),
    (("val",), None),
    (("best", "epoch"), "x"),
    (("best", "top1"), 10**400),
    (("epoch_seconds",), [1]),
    (("epochs",), True),
    (("complexity",), {}),
    (("complexity", "parameters"), "1"),
    (("router",), 5),
    (("router",), {"stages.1": LAYER | {"entropy": None}}),
    (("router",), {"stages.1": LAYER | {"load": 0.5}}),
]


def broken(keys: tuple[str, ...], value: Any) -> str:
    """``metrics.json`` that is right but for one value."""
    metrics = {
        "epochs": 1,
        "val": {"images": 12, "top1": 0.5},
        "best": {"epoch": 1, "top1": 0.5},
        "epoch_seconds": 1.0,
        "complexity": dict(COST),
        "router": {"stages.1": LAYER},
    }
    inner: Any = metrics
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(metrics)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"seed": 0, "val": {"miou": 0.5}}'),
        ("environment.json", ""),
        ("metrics.csv", "epoch,val/top1\n1,x\n"),
        ("metrics.csv", "epoch,val/top1\n1,0.5\n"),
        ("metrics.csv", "epoch,step,train/top1,val/top1,train/task_loss,val/loss\nnan,1,1,1,1,1\n"),
        ("metrics.csv", "epoch,val/top1\n1,0.5,7,7\n"),
        ("metrics.csv", "epoch,val/top1\n1,\0\n"),
        ("metrics.csv", "x" * 200_000),
        ("metrics.csv", FIFO),
        ("environment.json", FIFO),
        ("environment.json", "[" * 100_000),
        ("environment.json", '{"device": 5}'),
        *(("metrics.json", broken(keys, value)) for keys, value in WRONG_FIGURES),
    ],
)
def test_a_damaged_result_is_named(name: str, content: str, tmp_path: Path) -> None:
    keep(tmp_path, "pce_nano", 0, 0.5)
    path = tmp_path / "pce_nano-0" / name
    path.unlink()
    os.mkfifo(path) if content == FIFO else path.write_text(content)
    with pytest.raises(ValueError, match=r"pce_nano-0: its figures are damaged .*restore it, or remove the folder"):
        read_results(tmp_path)


def test_the_results_kept_here_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    results = RESULTS / "camvid-24-epochs"
    names = ["pce_unet_nano", "dense_unet_nano", "unet:pce_nano_s2"]
    line = ["compare", "--status", "--config", str(results / "recipe.yaml"), "--data", "elsewhere/camvid.zip"]
    assert main([*line, "--models", f"[{','.join(names)}]", "--seeds", "2", "--out", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "6 of 6 runs are finished" in shown
    assert "against dense_unet_nano" in shown

    def scores(name: str) -> list[float]:
        folders = [results / f"{name.replace(':', '-')}-{seed}" for seed in (0, 1)]
        return [json.loads((folder / "metrics.json").read_text())["val"]["miou"] for folder in folders]

    for name in names:
        first, second = (100 * score for score in scores(name))
        # Two values lie half their distance from their mean: the deviation is that times the square root of 2.
        assert f"{(first + second) / 2:.1f}% ± {abs(first - second) / math.sqrt(2):.1f}" in shown  # of 101 images
    first, second = (100 * (a - b) for a, b in zip(scores(names[0]), scores(names[1]), strict=True))
    half = 12.7062 * abs(first - second) / 2
    assert f"[{(first + second) / 2 - half:+.1f}, {(first + second) / 2 + half:+.1f}]" in shown


def test_zero_has_no_minus() -> None:
    """One image of few: the mean rounds to nothing, its interval does not."""
    assert difference_text({"mean": -0.003, "low": -1.06, "high": -0.001}, 0) == "+0 [-106, +0]"
