"""``pcenet explain`` over the command line: its numbers against the package's other measures, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pcenet.data as data
from pcenet.cli import main
from pcenet.explanation.command import history_of
from pcenet.models import load_model
from pcenet.nn import record_routing
from pcenet.runs.folder import RunFolder

Explain = Callable[..., Path]


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "explain.json").read_text())


def test_numbers_are_those_of_the_network(report: Path, awkward: Path) -> None:
    model = load_model(awkward / "routed")
    source = data.open_source(str(awkward / "data"), "val")
    transform = data.eval_transform(32)
    images = torch.stack([transform(source.image(index)) for index in range(len(source))])
    labels = torch.tensor(source.labels)
    with torch.inference_mode(), record_routing(model) as records:
        right = model(images).argmax(1) == labels
    (found,) = records.values()
    routing = found[0]
    result = numbers(report)
    assert (result["images"], result["model"], result["task"]) == (12, "pce_nano", "classify")
    assert result["score"]["value"] == pytest.approx(right.float().mean().item())
    assert result["interventions"]["score"] == result["score"]["value"]
    (layer,) = result["layers"]
    experts = routing.expert_ids[:, 0].view(12, -1)
    assert layer["grid"] == [routing.grid.rows, routing.grid.columns]
    assert layer["health"]["load"] == pytest.approx([(experts == e).float().mean().item() for e in range(2)])
    for number, name in enumerate(source.classes):
        expected = [int((experts[labels == number] == e).sum()) for e in range(2)]
        assert layer["by_class"][name] == expected
    assert layer["by_place"] == [(experts == e).sum(0).tolist() for e in range(2)]
    gate = routing.probs.amax(1)
    assert layer["sharpness"]["gate"] == pytest.approx(gate.mean().item(), abs=1e-6)
    for expert in range(2):
        of_expert = torch.where(experts == expert, gate.view(12, -1), 0).amax(1)
        shown = [each["gate"] for each in layer["gallery"][expert]]
        assert shown == pytest.approx(sorted(of_expert[of_expert > 0].tolist(), reverse=True), abs=1e-6)


def test_the_twin_stands_beside_it(report: Path, awkward: Path) -> None:
    model = load_model(awkward / "dense")
    source = data.open_source(str(awkward / "data"), "val")
    images = torch.stack([data.eval_transform(32)(source.image(index)) for index in range(len(source))])
    with torch.inference_mode():
        top1 = (model(images).argmax(1) == torch.tensor(source.labels)).float().mean().item()
    result = numbers(report)
    assert result["twin"]["value"] == pytest.approx(top1)
    assert result["twin"]["ahead"] == pytest.approx(result["score"]["value"] - top1, abs=1e-6)


def test_all_interventions_are_in_the_table(report: Path) -> None:
    result = numbers(report)["interventions"]
    layer = numbers(report)["layers"][0]["name"]
    rows = [(row["name"], row["layer"], row["expert"]) for row in result["rows"]]
    assert rows == [
        ("random expert", None, None),
        ("second choice", None, None),
        ("one expert for all", None, 0),
        ("one expert for all", None, 1),
        ("positions shuffled", None, None),
        ("positions removed", None, None),
        ("random expert", layer, None),
        ("knocked out", layer, 0),
        ("knocked out", layer, 1),
    ]
    for row in result["rows"]:
        assert row["score"] == pytest.approx(result["score"] + row["difference"])
        assert row["low"] <= row["difference"] <= row["high"]
    # With two experts and one layer, the next best is the other expert: knocked out is the same as the other for all.
    scores = {(row["name"], row["expert"]): row["score"] for row in result["rows"]}
    assert scores["knocked out", 0] == scores["one expert for all", 1]
    assert scores["knocked out", 1] == scores["one expert for all", 0]


def test_the_same_twice(explain: Explain) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first = digests(explain("--max-images", "5", name="a"))
    again = explain("--max-images", "5", name="b")
    assert numbers(again)["images"] == 5
    assert first == digests(again)


def test_images_of_ones_own(explain: Explain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, colour in (("b.png", "red"), ("a.png", "blue"), ("c.png", "green")):
        (tmp_path / "own").mkdir(exist_ok=True)
        Image.new("RGB", (40, 36), colour).save(tmp_path / "own" / name)
    (tmp_path / "own" / "aa.png").write_bytes(b"no image")
    out = explain("--images", str(tmp_path / "own"), "--shown", "2")
    (warning,) = [text for text in caplog.messages if "left out" in text]
    assert re.match(r"images: left out: .*own/aa\.png: the file cannot be read as an image", warning)
    page = (out / "explain.html").read_text()
    assert "own/a.png. The network says" in page
    assert "own/b.png. The network says" in page
    assert "c.png" not in page
    with Image.open(out / "figures" / "image-1.png") as image:
        assert image.convert("RGB").getpixel((200, 200)) == (0, 0, 255)


def test_a_history_of_loads_in_training_is_none(tmp_path: Path) -> None:
    """Versions before logged those, which are even by construction."""
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    path = run.logs / "metrics.csv"
    path.write_text("epoch,router/a/load_0,router/a/load_1\n1,0.5,0.5\n")
    assert history_of(run) is None
    path.write_text("epoch,router/a/load_0,val_router/a/load_0,val_router/a/load_1\n1,0.5,,\n2,,0.75,0.25\n")
    assert history_of(run) == [
        {"epoch": 1, "router/a/load_0": 0.5},
        {"epoch": 2, "val_router/a/load_0": 0.75, "val_router/a/load_1": 0.25},
    ]
    assert history_of(None) is None


def test_of_a_run_with_its_history(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcenet.training.run.draw", lambda *_: None)
    shape = '{"widths":[8,8,8],"num_experts":2,"patch_sizes":[null,null,2]}'
    quick = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
    run = str(tmp_path / "run")
    train = ["train", "--data", str(pictures), "--model-args", shape, "--epochs", "2", "--batch-size", "8"]
    assert main([*train, "--out", run, *quick]) == 0
    out = tmp_path / "report"
    options = ["--shown", "1", "--intervention-images", "4", "--out", str(out)]
    assert main(["explain", run, *options, *quick]) == 0  # the data is the run's
    result = numbers(out)
    assert result["history"] is True
    assert result["interventions"]["images"] == 4
    assert result["data"] == pictures.name
    (picture,) = (out / "figures").glob("*-load-by-epoch.png")
    page = (out / "explain.html").read_text()
    assert "over 2 epochs; in the last one" in page
    assert "no training logs" not in page
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_names_that_are_no_unicode(awkward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose name is in another encoding is refused as in training, whatever the network's classes are."""
    classes = sorted(folder.name for folder in (awkward / "data" / "val").iterdir())
    odd = os.fsdecode(b"_plain\xff")
    shutil.copytree(awkward / "data", tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "_plain").rename(tmp_path / "data" / split / odd)
    model = load_model(awkward / "routed")
    model.class_names = [*classes[:2], odd]
    model.save_pretrained(tmp_path / "model")
    error = refusal(capsys, str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert "the name 'train/_plain\\udcff' is no valid Unicode" in error
    assert not (tmp_path / "out").exists()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["explain", *arguments, "--device", "cpu", "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_refused(awkward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_data = ("--data", str(awkward / "data"))
    out = ("--out", str(tmp_path / "out"))
    routed, dense = str(awkward / "routed"), str(awkward / "dense")
    error = refusal(capsys, dense, *of_data, *out)
    assert f"run: {dense} is a dense network (dense_nano)" in error
    assert "no experts to explain" in error
    assert "pcenet eval" in error
    assert "give --data SOURCE" in refusal(capsys, routed, *out)
    assert "is no dense network to classify" in refusal(capsys, routed, *of_data, *out, "--twin", routed)
    assert "does not exist" in refusal(capsys, routed, *of_data, *out, "--images", "nothing.png")
    assert "shown must be at least 1" in refusal(capsys, routed, *of_data, *out, "--shown", "0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    error = refusal(capsys, routed, *of_data, "--out", str(tmp_path / "used"))
    assert "exists and is never overwritten" in error
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_other_classes_are_refused(awkward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(awkward / "data", tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "_plain").rename(tmp_path / "data" / split / "other")
    error = refusal(capsys, str(awkward / "routed"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert "plain" in error
    assert "other" in error


def test_what_cannot_be_read_is_named(
    awkward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    of_data = ("--data", str(awkward / "data"), "--out", str(tmp_path / "out"), "--intervention-images", "0")
    monkeypatch.setattr("pcenet.explanation.command.study", None)  # it is read before any work
    error = refusal(capsys, str(awkward / "routed"), *of_data, "--images", str(tmp_path / "broken.png"))
    assert re.search(r"images: none can be read, such as .*broken\.png: the file cannot be read", error)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    error = refusal(capsys, str(awkward / "routed"), *of_data, "--images", str(tmp_path / "texts"))
    assert re.search(r"images: none can be read, such as .*a\.txt: it is not named like an image", error)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_so_before_any_work(
    awkward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("pcenet.explanation.command.open_trained", None)
    assert "pip install 'pcenet[plot]'" in refusal(capsys, str(awkward / "routed"), "--out", str(tmp_path / "out"))


def test_a_bundled_network_finds_its_twin(bundle: Any, awkward: Path, tmp_path: Path) -> None:
    classes = sorted(folder.name for folder in (awkward / "data" / "val").iterdir())
    shape = {"widths": [8, 8, 8]}
    bundle("toys/pce_nano", classes, patch_sizes=[None, None, 2], num_experts=2, **shape)
    bundle("toys/dense_nano", classes, **shape)
    out = tmp_path / "out"
    options = ["--data", str(awkward / "data"), "--shown", "1", "--intervention-images", "0", "--out", str(out)]
    assert main(["explain", "toys/pce_nano", *options, "--device", "cpu", "--workers", "0"]) == 0
    assert numbers(out)["twin"]["run"] == "toys/dense_nano"
    assert np.isfinite(numbers(out)["twin"]["ahead"])
