"""``pcenet predict`` over the command line: labels, what is left out, and where results go."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.analysis import expert_map
from pcenet.cli import main
from pcenet.data import eval_transform
from pcenet.inference.batches import Batch
from pcenet.inference.classify import Classifier
from pcenet.inference.inputs import find_inputs
from pcenet.inference.outputs import Row
from pcenet.models import load_model
from pcenet.nn import record_routing

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


def results(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "predictions.json").read_text())


def expected(model_folder: Path, image: Image.Image) -> list[float]:
    """Probabilities of one image, by the model alone."""
    with torch.inference_mode():
        return load_model(model_folder)(eval_transform(32)(image)[None]).softmax(1)[0].tolist()


def test_files_folders_and_archives_with_their_labels(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = {
        "one.png": noise(0),
        "pics/b/two.png": noise(1, 90, 30),
        "pics/a.PNG": noise(2, 12, 12),
        "more.zip/x/three.png": noise(3),
        "more.zip/four.png": noise(4),
    }
    lay_out({name.replace(".zip/", ".zip!"): encode(image) for name, image in images.items()})
    lay_out({"pics/.hidden.png": b"", "more.zip!__MACOSX/four.png": b""})
    assert main(["predict", str(model_folder), "one.png", "pics", "more.zip", *CPU, "--batch-size", "2"]) == 0
    written = results("predictions")
    assert (written["model"], written["run"], written["left_out"]) == ("pce_nano", str(model_folder), [])
    order = ["one.png", "pics/a.PNG", "pics/b/two.png", "more.zip/four.png", "more.zip/x/three.png"]
    assert [record["file"] for record in written["predictions"]] == order
    with open("predictions/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = set()
    for record, row in zip(written["predictions"], rows, strict=True):
        probabilities = expected(model_folder, images[record["file"]])
        ranked = sorted(range(7), key=lambda number: -probabilities[number])[:5]
        assert [entry["label"] for entry in record["top"]] == [written["classes"][number] for number in ranked]
        assert [entry["probability"] for entry in record["top"]] == pytest.approx(
            [probabilities[number] for number in ranked], abs=1e-5
        )
        assert {key: record[key] for key in ("label", "probability")} == record["top"][0]
        assert (row["file"], row["label"], row["label_5"]) == (
            record["file"],
            record["label"],
            record["top"][4]["label"],
        )
        assert float(row["probability_5"]) == record["top"][4]["probability"]
        assert "routing" not in record
        labels.add(record["label"])
    assert len(labels) > 1, "the network must tell the images apart for this test to mean something"
    output = capsys.readouterr().out
    assert "5 of 5 images done" in output
    assert "5 predicted, 0 left out\nwrote predictions\n" in output
    assert "more.zip/x/three.png" in output


def test_every_batch_size_and_worker_gives_the_same_and_eval_agrees(
    model_folder: Path, noise: Callable[..., Image.Image], encode: Callable[..., bytes], lay_out: Callable[..., None]
) -> None:
    classes = load_model(model_folder).class_names
    lay_out({f"data/val/{name}/{i}.png": encode(noise(10 * i + n)) for n, name in enumerate(classes) for i in range(2)})
    found = []
    for number, options in enumerate((["--batch-size", "1"], ["--batch-size", "5"], ["--workers", "1"])):
        command = ["predict", str(model_folder), "data", "--out", f"out{number}", *CPU, *options, "--top", "7"]
        assert main(command) == 0
        found.append(results(f"out{number}")["predictions"])
    for other in found[1:]:
        for record, same in zip(found[0], other, strict=True):
            assert record["file"] == same["file"]
            assert record["label"] == same["label"]
            assert [entry["probability"] for entry in same["top"]] == pytest.approx(
                [entry["probability"] for entry in record["top"]], abs=1e-5
            )
    assert main(["eval", str(model_folder), "--data", "data", "--out", ".", *CPU]) == 0
    confusion = [[0] * 7 for _ in classes]
    for record in found[0]:
        confusion[classes.index(Path(record["file"]).parent.name)][classes.index(record["label"])] += 1
    assert json.loads(Path("eval-data-val.json").read_text())["confusion"] == confusion


def test_the_expert_of_each_patch_on_request(
    model_folder: Path, noise: Callable[..., Image.Image], encode: Callable[..., bytes], lay_out: Callable[..., None]
) -> None:
    lay_out({f"pics/{number}.png": encode(noise(number)) for number in range(3)})
    assert main(["predict", str(model_folder), "pics", "--routing", "--top", "1", "--batch-size", "2", *CPU]) == 0
    model = load_model(model_folder)
    for number, record in enumerate(results("predictions")["predictions"]):
        with torch.inference_mode(), record_routing(model) as records:
            model(eval_transform(32)(noise(number))[None])
        assert len(record["routing"]) == 2
        assert record["routing"] == {name: expert_map(routings[0])[0].tolist() for name, routings in records.items()}
        assert [len(grid) for grid in record["routing"].values()] == [4, 8]  # 16/4 and 8/1 patches a side
        assert len(record["top"]) == 1


def test_odd_files_are_read_as_they_look(
    model_folder: Path, noise: Callable[..., Image.Image], encode: Callable[..., bytes], lay_out: Callable[..., None]
) -> None:
    colour, grey = noise(0), noise(1).convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    palette = noise(2).quantize(16)
    transparent = encode(palette, transparency=3)
    see_through = Image.open(BytesIO(transparent)).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", see_through.size, "white"), see_through).convert("RGB")
    cyan_free = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    jpeg = encode(colour, "JPEG")
    files = {
        "pics/16bit.png": (encode(sixteen), grey.convert("RGB")),
        "pics/animated.gif": (encode(palette, "GIF", save_all=True, append_images=[noise(3)]), palette.convert("RGB")),
        "pics/cmyk.tif": (
            encode(cyan_free, "TIFF"),
            Image.new("RGB", (32, 32), "red"),
        ),
        "pics/grey.png": (encode(grey), grey.convert("RGB")),
        "pics/lies.png": (jpeg, Image.open(BytesIO(jpeg))),
        "pics/palette.png": (transparent, on_white),
        "pics/turned.png": (encode(colour, exif=turned), colour.transpose(Image.Transpose.ROTATE_270)),
    }
    lay_out({name: content for name, (content, _) in files.items()})
    assert main(["predict", str(model_folder), "pics", "--top", "7", *CPU]) == 0
    written = results("predictions")
    assert written["left_out"] == []
    assert [record["file"] for record in written["predictions"]] == list(files)
    for record in written["predictions"]:
        probabilities = expected(model_folder, files[record["file"]][1])
        by_class = {entry["label"]: entry["probability"] for entry in record["top"]}
        assert [by_class[name] for name in written["classes"]] == pytest.approx(probabilities, abs=1e-5), record["file"]


def test_broken_files_are_reported_and_stop_nothing(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, jpeg = encode(noise(0)), encode(noise(1, 200, 200), "JPEG")
    lay_out(
        {
            "pics/a.png": good,
            "pics/cut.jpg": jpeg[: len(jpeg) // 2],
            "pics/empty.png": b"",
            "pics/notes.txt": b"a note",
            "pics/page.jpg": b"<!DOCTYPE html><title>404</title>",
            "pics/parts.zip!a.png": good,
            "pics/z.png": good,
            "broken.zip": b"PK\x03\x04 and no more",
            "unsafe.zip!../outside.png": good,
        }
    )
    Path("pics/gone.png").symlink_to("nowhere.png")
    os.mkfifo("pics/pipe.png")
    given = ["pics", "broken.zip", "unsafe.zip", "pics/notes.txt"]
    assert main(["predict", str(model_folder), *given, "--batch-size", "2", *CPU]) == 0
    written = results("predictions")
    assert [record["file"] for record in written["predictions"]] == ["pics/a.png", "pics/z.png"]
    reasons = {entry["file"]: entry["reason"] for entry in written["left_out"]}
    output = capsys.readouterr().out
    for file, reason in {
        "pics/cut.jpg": "image file is truncated",
        "pics/empty.png": "(it is empty)",
        "pics/gone.png": "the file cannot be read (No such file or directory)",
        "pics/notes.txt": "it is not named like an image",
        "pics/page.jpg": "(it is a web page)",
        "pics/parts.zip": "an archive inside a folder or an archive is not read; give it by itself",
        "pics/pipe.png": "it is no regular file",
        "broken.zip": "cannot be read as a zip archive",
        "unsafe.zip": "unsafe name '../outside.png'",
    }.items():
        assert reason in reasons.pop(file), file
        assert f"left out: {file}: " in output
    assert reasons == {}
    assert "2 predicted, 9 left out" in output
    with open("predictions/predictions.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["pics/a.png", "pics/z.png"]


def test_nothing_predicted_is_exit_1_with_the_reasons(
    model_folder: Path, lay_out: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out({"a.png": b"", "b.png": b"text"})
    assert main(["predict", str(model_folder), "a.png", "b.png", "--out", "out", *CPU]) == 1
    assert [entry["file"] for entry in results("out")["left_out"]] == ["a.png", "b.png"]
    assert results("out")["predictions"] == []
    assert capsys.readouterr().err == "pcenet: error: none of 2 files could be predicted\n"


def test_results_are_never_overwritten(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lay_out({"a.png": encode(noise(0)), "b.png": encode(noise(1)), "mine/notes": b"mine"})
    for name in ("a.png", "b.png", "a.png"):
        assert main(["predict", str(model_folder), name, *CPU]) == 0
    files = [results(folder)["predictions"][0]["file"] for folder in ("predictions", "predictions-2", "predictions-3")]
    assert files == ["a.png", "b.png", "a.png"]
    capsys.readouterr()
    for taken in ("mine", "a.png"):
        assert main(["predict", str(model_folder), "b.png", "--out", taken, *CPU]) == 2
        assert capsys.readouterr().err.startswith(f"pcenet: error: out: {taken} exists and is never overwritten")
    assert [path.name for path in Path("mine").iterdir()] == ["notes"]


def test_an_interruption_leaves_no_half_results(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lay_out({f"pics/{number}.png": encode(noise(number)) for number in range(3)})
    predict_batch, batches = Classifier.__call__, iter(range(2))

    def interrupted(self: Classifier, batch: Batch) -> list[Row]:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return predict_batch(self, batch)

    monkeypatch.setattr(Classifier, "__call__", interrupted)
    assert main(["predict", str(model_folder), "pics", "--batch-size", "1", *CPU]) == 130
    assert [path.name for path in Path().iterdir()] == ["pics"]


def test_a_network_without_class_names_gives_class_numbers(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
) -> None:
    lay_out({"a.png": encode(noise(0))})
    model = load_model(model_folder)
    model.class_names = None
    model.save_pretrained("nameless")
    assert main(["predict", "nameless", "a.png", *CPU]) == 0
    assert results("predictions")["classes"] == ["0", "1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predict", "the following arguments are required: run, inputs"),
        ("predict MODEL", "the following arguments are required: inputs"),
        ("predict nowhere a.png", "run: nowhere is no run folder or model folder"),
        (
            "predict MODEL b.png",
            "inputs: 'b.png' does not exist; give files, folders or .zip archives; did you mean",
        ),
        ("predict MODEL bare", "inputs: no image file in bare"),
        ("predict MODEL a.png --top 0", "top must be at least 1, got 0"),
        ("predict MODEL a.png --config wrong.yaml", "routing must be true or false, got 'perhaps'"),
    ],
)
def test_wrong_usage_is_exit_2_and_writes_nothing(
    line: str, message: str, model_folder: Path, lay_out: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out({"a.png": b"", "bare/.hidden": b"", "wrong.yaml": b"routing: perhaps\n"})
    assert main(line.replace("MODEL", str(model_folder)).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pcenet: error: {message}")
    assert error.count("\n") == 1
    assert not Path("predictions").exists()


def test_each_file_comes_once_by_whatever_paths_it_was_named(lay_out: Callable[..., None]) -> None:
    lay_out({"pics/a.png": b"", "pics/b.png": b"", "more.zip!a.png": b"", "more.zip!pics/a.png": b""})
    Path("pics/c.png").symlink_to("a.png")  # a file of its own: it has another name
    Path("link").symlink_to("pics")
    everything = [
        "pics",
        "pics/b.png",
        "./pics/",
        "link",
        "link/a.png",
        str(Path("pics").resolve()),
        "pics/../pics/b.png",
    ]
    files, left_out = find_inputs([*everything, "more.zip", "./more.zip", "link/../more.zip"])
    assert [file.file for file in files] == [
        *("pics/a.png", "pics/b.png", "pics/c.png"),
        *("more.zip/a.png", "more.zip/pics/a.png"),
    ]
    assert left_out == []
    assert [file.file for file in find_inputs(["link/a.png", "pics"])[0]] == ["link/a.png", "pics/b.png", "pics/c.png"]
    os.chdir("pics")
    assert [file.file for file in find_inputs(["."])[0]] == ["a.png", "b.png", "c.png"]
