"""The commands as functions, and predictions in memory."""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pcenet
from pcenet.cli import main
from pcenet.data import DataError
from pcenet.inference.predictions import GivenImage, Prediction, Predictions, Segmentation, pictures

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "workers": 0, "device": "cpu", "precision": "fp32"}
FUNCTIONS = ("train", "evaluate", "predict", "explain", "export", "compare")


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> pcenet.TrainedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.draw", lambda *_: None)
        return pcenet.train(data=pictures, model="dense_nano", out=tmp_path_factory.mktemp("api") / "run", **QUICK)


def test_functions_are_functions_whatever_was_imported_before() -> None:
    for module in pkgutil.walk_packages(pcenet.__path__, "pcenet."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert all(callable(getattr(pcenet, name)) and type(getattr(pcenet, name)) is type(main) for name in FUNCTIONS)


def test_a_run_says_what_it_is(run: pcenet.TrainedRun, pictures: Path) -> None:
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert run.metrics == metrics
    assert run.score == metrics["val"]["top1"]
    assert repr(run) == f"TrainedRun('{run.path}': dense_nano, top1 {run.score:.4f}, 1 epochs)"
    assert run.model.class_names == sorted(path.name for path in (pictures / "train").iterdir())
    assert run.model is run.model
    again = pcenet.train(data=pictures, model="dense_nano", out=run.path, **QUICK)
    assert again.metrics == metrics
    measured = pcenet.evaluate(run, workers=0, device="cpu", precision="fp32")
    assert measured.top1 == pytest.approx(run.score)


def test_predictions_are_those_of_the_command(run: pcenet.TrainedRun, pictures: Path, tmp_path: Path) -> None:
    found = run.model.predict(pictures / "val", precision="fp32")
    quick = ["--precision", "fp32", "--device", "cpu", "--workers", "0"]
    assert main(["predict", str(run.path), str(pictures / "val"), "--out", str(tmp_path / "out"), *quick]) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert [item.file for item in found] == [each["file"] for each in written]
    assert [item.label for item in found] == [each["label"] for each in written]
    assert [item.probability for item in found] == pytest.approx([each["probability"] for each in written], abs=1e-6)
    again = pcenet.predict(run, str(pictures / "val"), precision="fp32", top=1)
    assert [item.top for item in again] == [[(item.label, item.probability)] for item in found]
    found.to_csv(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["label"]) for row in rows] == [(item.file, item.label) for item in found]


def test_one_picture_in_any_form_is_predicted_alike(run: pcenet.TrainedRun, pictures: Path) -> None:
    path = next((pictures / "val").rglob("*.png"))
    image = Image.open(path).convert("RGB")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [path, str(path), image, array, array / 255, tensor, tensor.float() / 255, tensor[None], [image, str(path)]]
    found = [run.model.predict(form, precision="fp32")[0] for form in forms]
    assert {item.label for item in found} == {found[0].label}
    assert [item.probability for item in found] == pytest.approx([found[0].probability] * len(forms), abs=1e-6)
    (rounded,) = run.model.predict((tensor.float() / 255).bfloat16(), precision="fp32")
    assert rounded.probability == pytest.approx(found[0].probability, abs=0.05)
    assert found[2].file == "image 0"
    assert [item.file for item in run.model.predict([image, array])] == ["image 0", "image 1"]
    assert np.array_equal(np.array(found[3].picture()), array)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_in_another_type_of_numbers_predicts(dtype: torch.dtype) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("cifar10/pce_nano", "cifar10/dense_nano"):
        (expected,) = pcenet.load_model(name).predict(image, precision="fp32")
        model = pcenet.load_model(name, dtype=dtype)
        for precision in ("fp32", "bf16", None):
            (found,) = model.predict(image, precision=precision)
            assert found.label == expected.label
            assert found.probability == pytest.approx(expected.probability, abs=1e-5 if dtype is torch.float64 else 0.1)


def test_a_head_with_other_outputs_than_classes_is_named() -> None:
    model = pcenet.load_model("cifar10/dense_nano")
    model.head.fc = torch.nn.Linear(96, 12)
    with pytest.raises(ValueError, match="the network gives 12 logits and knows 10 classes; call reset_classifier"):
        model.predict(np.zeros((32, 32, 3), np.uint8))


def test_modes_of_a_network_are_left_as_they_were(run: pcenet.TrainedRun) -> None:
    model = pcenet.load_model(run.path)
    model.train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.predict(np.zeros((32, 32, 3), np.uint8))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pixels_get_classes_at_the_size_of_the_image() -> None:
    model = pcenet.load_model("camvid/pce_unet_nano")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    (item,) = model.predict(image, precision="fp32")
    assert isinstance(item, Segmentation)
    assert item.mask.shape == (48, 64)
    assert list(item.classes) == model.class_names
    assert sum(item.shares.values()) == pytest.approx(1)
    assert item.picture().size == (64, 48)
    assert np.array_equal(np.array(item.picture(opacity=0.0)), image)
    # Five layers; at 192x256 the first has maps of 96x128 in patches of 32, the deepest of 24x32 in patches of 4.
    grids = {name: (len(rows), len(rows[0])) for name, rows in item.experts.items()}
    assert len(grids) == 5
    assert (grids["stages.0.0.body"], grids["stages.2.1.body"]) == ((3, 4), (6, 8))


def test_shares_and_pictures_by_hand() -> None:
    mask = np.array([[0, 0, 1], [0, 2, 2]], np.uint8)
    item = Segmentation(
        "a.png", mask, ["sky", "road", "tree", "car"], source=GivenImage("a.png", Image.new("RGB", (3, 2)))
    )
    assert item.shares == {"sky": 0.5, "road": pytest.approx(1 / 6), "tree": pytest.approx(1 / 3), "car": 0}
    assert str(item) == "a.png: sky 50.00%, tree 33.33%, road 16.67%"
    assert item.row == {"file": "a.png", **{f"share_{name}": share for name, share in item.shares.items()}}


def test_a_list_that_shows_itself(tmp_path: Path) -> None:
    items = [Prediction(f"{n}.jpg", "cat", 0.75, [("cat", 0.75)]) for n in range(12)]
    found = Predictions(items)
    assert (len(found), found[3].file, [item.file for item in found[1:3]]) == (12, "3.jpg", ["1.jpg", "2.jpg"])
    lines = repr(found).splitlines()
    assert lines[:2] == ["12 predictions", "  0.jpg: cat 75.00%"]
    assert lines[-1] == "  and 2 more"
    assert repr(Predictions([])) == "0 predictions"
    Predictions([]).to_csv(tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text() == "file\n"


def test_a_figure_of_the_first(run: pcenet.TrainedRun, pictures: Path) -> None:
    figure = run.model.predict(pictures / "val").plot(columns=5)
    assert [len(panel.images) for panel in figure.axes] == [1] * 12
    assert figure.axes[0].get_title().startswith(str(pictures))


def test_what_cannot_be_read_is_left_out(run: pcenet.TrainedRun, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    found = run.model.predict(tmp_path)
    assert [Path(item.file).name for item in found] == ["a.png"]
    assert [Path(file.file).name for file in found.left_out] == ["b.png"]
    assert "left out" in repr(found)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "inputs must be paths, PIL images, arrays, tensors, or a list of them, not int"),
        ("nowhere.jpg", ValueError, "inputs: 'nowhere.jpg' does not exist"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"an array must be .*, not \[4, 4, 5\]"),
        (torch.zeros(2, 4, 4), ValueError, r"a tensor must be .*, not \[2, 4, 4\]"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "must be uint8 .* or float .*, not int64"),
        (np.zeros((0, 3, 3), np.uint8), ValueError, r"must have pixels, not the shape \[0, 3, 3\]"),
        (torch.full((3, 4, 4), -2.0), ValueError, "before they are normalised, not from -2 to -2"),
    ],
)
def test_what_is_no_image_is_named(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pcenet.load_model("cifar10/pce_nano").predict(given)


def test_grey_and_transparent_pictures_become_colours() -> None:
    (grey,) = pictures(np.full((2, 3), 7, np.uint8), "a")
    assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    given = Image.new("RGBA", (3, 2), (1, 2, 3, 0))
    (transparent,) = pictures(given, "a")
    assert (transparent.mode, transparent.getpixel((0, 0))) == ("RGB", (255, 255, 255))  # laid on white, as files are
    assert given.getpixel((0, 0)) == (1, 2, 3, 0)
    deep = Image.fromarray(np.array([[0, 2000], [4000, 1000]], np.uint16))
    (seen,) = pictures(deep, "a", grey_range=(0, 4000))
    assert [seen.getpixel((x, y))[0] for x, y in ((0, 0), (1, 0), (0, 1))] == [0, 127, 255]
    with pytest.raises(DataError, match="a: its pixels are floating-point numbers"):
        list(pictures(Image.new("F", (3, 2)), "a"))
    assert len(list(pictures(torch.zeros(5, 1, 4, 4), "a"))) == 5


def test_a_picture_is_what_its_file_is(run: pcenet.TrainedRun, tmp_path: Path) -> None:
    """Transparent where it would be black, and turned."""
    image = Image.new("RGBA", (32, 40), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (4, 4, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        found = [run.model.predict(each, precision="fp32")[0] for each in (tmp_path / "a.png", opened)]
    assert found[0].probability == found[1].probability
    assert np.array_equal(np.array(found[0].picture()), np.array(found[1].picture()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be a whole number from 1 on, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"precision": "bf61"}, "precision 'bf61' is not one of auto, bf16, fp16, fp32, tf32"),
    ],
)
def test_options_of_predict_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pcenet.load_model("cifar10/pce_nano").predict(np.zeros((4, 4, 3), np.uint8), **options)


@pytest.mark.parametrize("name", ["seed", "resume", "dry_run", "find"])
def test_a_comparison_has_no_options_of_a_single_run(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is of a single run"):
        pcenet.compare(["dense_nano"], data="digits", **{name: 1})


@pytest.mark.parametrize("function", ["train", "evaluate", "explain", "export", "compare"])
def test_an_unknown_option_is_named(function: str, run: pcenet.TrainedRun) -> None:
    subject = () if function in ("train", "compare") else (run,)
    given = {"data": "digits", "epoch": 3} if not subject else {"seeed": 1, "treads": 2}
    name, nearest = ("epoch", "epochs") if not subject else ("seeed", "")
    with pytest.raises(TypeError, match=f"unknown option '{name}'.*{nearest}"):
        getattr(pcenet, function)(*subject, **given)


def test_an_exported_file_and_a_comparison(run: pcenet.TrainedRun, pictures: Path, tmp_path: Path) -> None:
    written = pcenet.export(run, format="pt2", out=tmp_path / "net.pt2")
    assert written.path == tmp_path / "net.pt2"
    assert written.path.is_file()
    report = pcenet.compare(
        ["dense_nano"], seeds=1, data=pictures, out=tmp_path / "all", **QUICK, variants={"slow": {"lr": 1e-4}}
    )
    assert [each["name"] for each in report["runs"]] == ["dense_nano-0"]
    before = set((tmp_path / "all").rglob("*"))
    shown = pcenet.compare(["dense_nano"], seeds=2, data=pictures, out=tmp_path / "all", **QUICK, status=True)
    assert [each["name"] for each in shown["runs"]] == ["dense_nano-0"]
    assert set((tmp_path / "all").rglob("*")) == before
