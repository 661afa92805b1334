"""Lists and saved data sets go through every command as folders do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcenet import cli
from pcenet.app.config import AppConfig
from pcenet.app.server import open_samples
from pcenet.data import open_source
from pcenet.models import load_model
from pcenet.runs.config import TrainConfig
from pcenet.runs.fingerprint import fingerprint
from pcenet.runs.folder import RunFolder
from pcenet.training.run import train

Start = Callable[..., TrainConfig]
QUICK = ["--threads", "1"]


@pytest.fixture
def listed(pictures: Path, tmp_path: Path) -> Path:
    """A list of the pictures, by absolute paths."""
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(pictures.glob("*/*/*.png"))]
    path = tmp_path / "listed.csv"
    path.write_text("\n".join(["image,label,split", *rows]))
    return path


@pytest.fixture
def saved(pictures: Path, tmp_path: Path) -> Path:
    """The pictures as the library datasets saves them."""
    datasets = pytest.importorskip("datasets")
    classes = ["blue", "green", "red"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    parts = {}
    for split in ("train", "val"):
        files = [(path, name) for name in classes for path in sorted((pictures / split / name).glob("*.png"))]
        values = {"image": [str(path) for path, _ in files], "label": [classes.index(name) for _, name in files]}
        parts[split] = datasets.Dataset.from_dict(values, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_run_on_a_list_is_the_run_on_its_folder(start: Start, listed: Path) -> None:
    models = [
        train(start(name, epochs=1, **data)).model / "model.safetensors"
        for name, data in (("folder", {}), ("list", {"data": str(listed)}))
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_list_whose_labels_have_changed_is_another_set(listed: Path) -> None:
    before = fingerprint({"train": open_source(listed, "train")})
    assert fingerprint({"train": open_source(listed, "train")}) == before
    text = listed.read_text()
    listed.write_text(text.replace("/train/red/0.png,red", "/train/red/0.png,blue"))
    assert fingerprint({"train": open_source(listed, "train")}) != before


@pytest.mark.parametrize("kind", ["listed", "saved"])
def test_commands_take_it(
    kind: str, start: Start, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(request.getfixturevalue(kind))
    assert cli.main(["check-data", source, "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["images"] == {"train": 24, "val": 12}
    folder = train(start(epochs=1, data=source))
    assert cli.main(["eval", str(folder.path), *QUICK]) == 0
    (found,) = folder.path.glob(f"eval-{kind}-val*.json")
    assert json.loads(found.read_text())["images"] == 12
    model = load_model(folder.model)
    samples = open_samples(AppConfig(str(folder.path)), model, RunFolder(folder.path))
    assert samples is not None
    assert np.asarray(samples.image(0)).shape == (32, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["listed", "saved"])
def test_reports_and_comparisons_take_it(
    kind: str, start: Start, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(request.getfixturevalue(kind))
    folder = train(start(epochs=1, data=source))
    assert cli.main(["explain", str(folder.path), "--max-images", "4", "--out", str(tmp_path / "why"), *QUICK]) == 0
    page = (tmp_path / "why" / "explain.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page  # a page to be shown names no folder of the machine
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models: [pce_nano]\nseeds: [0]\nepochs: 1\nbatch_size: 8\ndata: {source}\nthreads: 1\n")
    assert cli.main(["compare", "--config", str(recipe), "--out", str(tmp_path / "compared")]) == 0
    assert len(json.loads((tmp_path / "compared" / "comparison.json").read_text())["runs"]) == 1
