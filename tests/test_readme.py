"""What a newcomer reads is run, and its figures are those of the raw results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Twenty pictures of each of two classes, of odd sizes, in the folder that the README names."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for channel, name in ((0, "leaf"), (2, "sky")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 120, (40 + index, 56, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.jpg")
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_layer_takes_six_lines():
    (code,) = (block.strip().splitlines() for block in blocks("python") if "PCELayer(" in block)
    assert len([line for line in code if line and not line.startswith(("import", "from"))]) <= 6


IN_ONE_PROCESS = {"train", "eval", "predict", "explain"}


def test_commands_run(pictures):
    (pictures / "photos").mkdir()
    with Image.open(ROOT / "docs" / "images" / "scene.jpg") as street:
        street.save(pictures / "photos" / "street.png")
        size = street.size
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pcenet ")]
    names = ["predict", "models", "check-data", "train", "eval", "predict", "explain", "export"]
    assert [command.split()[1] for command in commands] == names
    for command in commands:
        quick = ["--workers", "0", "--threads", "1"] if command.split()[1] in IN_ONE_PROCESS else []
        assert main([*shlex.split(command)[1:], *quick]) == 0, command
    with Image.open(pictures / "masks/masks/photos/street.png") as mask:
        assert mask.size == size
    result = json.loads((pictures / "runs/pictures/eval-pictures-test.json").read_text())
    assert result["images"] == 4
    assert set(result["per_class"]) == {"leaf", "sky"}
    assert len((pictures / "predictions" / "predictions.csv").read_text().splitlines()) == 1 + 20
    assert {"explanation/explain.html", "pictures.onnx"} <= {str(p.relative_to(pictures)) for p in pictures.rglob("*")}


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make (\w+)", README)
    assert "demo" in targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_named_exist():
    rows = re.findall(r"^\|((?: ?`[^`|]*[/.][^`|]*`,?)+) \|", README, re.MULTILINE)
    names = re.findall(r"\]\(([^)#:]+)\)", README) + [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    assert "docs/guide.md" in names
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("data", "names", "score"),
    [
        ("finals-cifar10", ["dense_nano", "dense_nano_position", "pce_nano"], "top1"),
        ("finals-camvid", ["dense_unet_nano", "dense_unet_nano_position", "pce_unet_nano"], "miou"),
    ],
)
def test_scores_are_those_of_the_raw_results(data, names, score):
    rows = re.findall(rf"^\| `({'|'.join(names)})` \|(.*)\|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == names
    for name, row in rows:
        files = sorted((ROOT / "experiments" / "results" / data).glob(f"{name}-[0-9]/metrics.json"))
        runs = [json.loads(file.read_text()) for file in files]
        cost, scores = runs[0]["complexity"], [run["val"][score] for run in runs]
        assert [cell.strip() for cell in row.split("|")] == [
            f"{100 * sum(scores) / len(scores):.2f} %",
            ", ".join(f"{100 * each:.2f}" for each in scores),
            f"{cost['multiply_adds'] / 1e6:.1f} M",
            f"{cost['parameters'] / 1e6:.2f} M",
            f"{cost['active_parameters'] / 1e6:.2f} M",
        ]
