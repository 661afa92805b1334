"""The real command line on sound and faulty data, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcenet.analysis.samples import overlay
from pcenet.cli import main
from pcenet.writing import write_text


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    files = [
        f"{split}/{name}/{index}.png" for split in ("train", "val") for name in ("cat", "dog") for index in range(3)
    ]
    for seed, file in enumerate(files):
        picture(tmp_path / "pets" / file, seed)
    return tmp_path / "pets"


@pytest.fixture
def street(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "val")):
        picture(tmp_path / f"street/{split}/images/a.png", seed)
        (tmp_path / f"street/{split}/masks").mkdir()
        Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9) % 2).save(tmp_path / f"street/{split}/masks/a.png")
    return tmp_path / "street"


@pytest.mark.slow
def test_the_real_command_line_names_a_fault_and_exits_with_1(pets: Path) -> None:
    (pets / "val/dog/2.png").write_bytes(b"<html>")
    run = [sys.executable, "-m", "pcenet", "check-data", str(pets), "--json", str(pets.parent / "r.json")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "val/dog/2.png" in done.stdout
    assert "1 error(s), 0 warning(s): training would refuse" in done.stdout
    report = json.loads((pets.parent / "r.json").read_text())
    assert report["usable"] is False
    assert report["counts"]["val"] == {"cat": 3, "dog": 3}
    assert [finding["file"] for finding in report["findings"]] == ["val/dog/2.png"]


def test_a_sound_set_exits_with_0_and_leaves_a_sheet(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pets.parent / "sheet"
    assert main(["check-data", str(pets), "--out", str(out)]) == 0
    assert "0 error(s), 0 warning(s): training would accept" in capsys.readouterr().out
    with Image.open(out / "samples.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 81  # the pixels of the noise


def test_masks(street: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = street.parent / "sheet"
    command = ["check-data", str(street), "--task", "segment", "--classes", '["sky", "road"]', "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "50.62%" in shown  # 41 of 81 pixels
    assert "sky" in shown
    assert (out / "samples.png").is_file()
    assert main([*command, "--ignore-index", "1"]) == 1  # one class is left
    assert "two or more classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.zip"], "'nowhere.zip' does not exist"),
        (["digits"], "comes with the program"),
        (["PETS", "--task", "segmnt"], "did you mean 'segment'?"),
        (["PETS", "--ignore-index", "300"], "ignore_index must be a mask value from 0 to 255, not 300"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", *(str(pets) if word == "PETS" else word for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_many_findings_of_one_kind_are_counted(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(14):
        (pets / f"train/cat/x{index:02}.png").write_bytes(b"")
    assert main(["check-data", str(pets)]) == 1
    shown = capsys.readouterr().out
    assert "train/cat/x09.png" in shown
    assert "train/cat/x10.png" not in shown
    assert "and 4 more" in shown
    assert "14 error(s)" in shown


def test_an_overlay_is_half_image_and_half_colour() -> None:
    image = Image.new("RGB", (3, 1), (255, 0, 51))
    mask = Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint8))
    # #0072B2 and #E69F00 are the first two colours; the third pixel does not count
    halves = [[127, 57, 114], [242, 79, 25], [255, 0, 51]]
    assert np.abs(np.asarray(overlay(image, mask)).astype(int) - halves).max() <= 1


def test_masks_need_no_task(street: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(street), "--classes", '["sky", "road"]']) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"task segment: {street} has images and masks"
    assert "50.62%" in shown
    assert main(["check-data", str(street), "--task", "classify"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "has images and masks" not in shown
    assert "--task" in shown


def test_what_was_guessed_and_left_out_is_a_warning(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets / "train").rename(pets / "Training")
    for name in ("notes.txt", "labels.csv"):
        (pets / "Training/cat" / name).write_text("x")
    (pets / "Training/cat/@eaDir").mkdir()
    picture(pets / "Training/cat/@eaDir/0.png", 99)
    assert main(["check-data", str(pets), "--json", str(pets.parent / "r.json")]) == 0
    assert "0 error(s), 2 warning(s): training would accept" in capsys.readouterr().out
    report = json.loads((pets.parent / "r.json").read_text())
    assert report["images"] == {"train": 6, "val": 6}
    guessed, left_out = (finding["message"] for finding in report["findings"])
    assert guessed == "folders are read as splits by their names: 'Training' as train."
    assert left_out.startswith("2 file(s) in class folders are not named like images and are left out")
    assert report["findings"][1]["file"] == "Training/cat/labels.csv"


@pytest.mark.parametrize("kind", ["class", "file"])
def test_a_name_that_is_no_text_is_an_error_that_names_the_file(
    pets: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Training refuses it, too: see "class name that is no text" in test_bad_input.py."""
    name = os.fsdecode(b"h\xf6rse")
    picture(pets / "train" / (f"{name}/1.png" if kind == "class" else f"cat/{name}.png"), 99)
    assert main(["check-data", str(pets), "--json", str(pets.parent / "r.json")]) == 1
    assert "1 error(s), 0 warning(s): training would refuse" in capsys.readouterr().out
    (finding,) = json.loads((pets.parent / "r.json").read_text())["findings"]
    assert finding["file"] == (f"train/{name}" if kind == "class" else f"train/cat/{name}.png")
    assert "is no valid Unicode (UTF-8)" in finding["message"]


def test_a_folder_is_not_replaced_by_a_file(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(pets.rglob("*"))
    assert main(["check-data", str(pets), "--json", str(pets)]) == 2
    assert capsys.readouterr().err == f"pcenet: error: json {str(pets)!r} is a folder; give the name of a file\n"
    with pytest.raises(IsADirectoryError):
        write_text(pets, "text")
    assert sorted(pets.rglob("*")) == before


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        write_text(pipe, "text")
        assert reader.communicate()[0] == "text"
    assert pipe.is_fifo()
