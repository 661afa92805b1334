"""Names from strangers, of files and of classes: data as they are, and nothing that a terminal or a page obeys."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.cli import main
from pcenet.data import eval_transform
from pcenet.models import load_model
from pcenet.models.card import model_card

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
# Each of these has been taken for another one, or for nothing, by some program.
ODD = [
    "photo 1.png",
    "photo  1.png",
    "photo\t1.png",
    "photo\n1.png",
    " photo 1.png",
    "photo 1 .png",
    "photo\r.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "[red].png",
    ":dog:.png",
    'a,"b".png',
    "=1+1.png",
    "DataError: x.png",
    "back\\slash.png",
    "$x$.png",
    "\x1b[31mred.png",
    "\u202egnp.png",
    "zero\u200bwidth.png",
    os.fsdecode(b"caf\xe9.png"),
    os.fsdecode(b"caf\xe8.png"),
]
COMMANDS = "\x1b[31m\x1b]0;title\x07\x9b1m\u202e\u200b\u2028"  # colours, a title, C1, direction, no width, a line's end
CLASSES = [f"a{COMMANDS}", "b[red][/b]", "c$_{"]


def noise(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((32, 32), Image.Resampling.BICUBIC)


def assert_seen(text: str) -> None:
    """No character that is obeyed or cannot be seen."""
    assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []


@pytest.fixture(scope="session")
def classifier(save_classifier: Callable[[list[str]], Path]) -> Path:
    return save_classifier(CLASSES)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.faults("odd names of files")
def test_each_file_has_its_own_row_under_its_exact_name(
    classifier: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pics").mkdir()
    for number, name in enumerate(ODD):
        noise(number).save(f"pics/{name}", "PNG")
    Path("pics/bad\n 1.png").write_bytes(b"\n")
    assert main(["predict", str(classifier), "pics", "pics/photo  1.png", "--top", "3", *CPU]) == 0
    found = json.loads(Path("predictions/predictions.json").read_text())
    assert found["classes"] == CLASSES
    by_file = {record["file"]: record for record in found["predictions"]}
    assert by_file.keys() == {f"pics/{name}" for name in ODD}
    assert len(found["predictions"]) == len(ODD)
    model = load_model(classifier)
    for number, name in enumerate(ODD):
        with torch.inference_mode():
            probabilities = model(eval_transform(32)(noise(number))[None]).softmax(1)[0]
        by_class = {entry["label"]: entry["probability"] for entry in by_file[f"pics/{name}"]["top"]}
        assert [by_class[label] for label in CLASSES] == pytest.approx(probabilities.tolist(), abs=1e-5), name
    assert [entry["file"] for entry in found["left_out"]] == ["pics/bad\n 1.png"]
    assert found["left_out"][0]["reason"].startswith("the file cannot be read as an image")
    with open("predictions/predictions.csv", encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    escaped = {f"pics/{name}" for name in ODD[:-2]} | {"pics/caf\\udce9.png", "pics/caf\\udce8.png"}
    assert rows.keys() == escaped
    for name, row in rows.items():
        exact = name.replace("\\udce9", "\udce9").replace("\\udce8", "\udce8")
        assert Path(exact).is_file()
        assert row["label"] == by_file[exact]["label"]
    assert_seen(capsys.readouterr().out)


@pytest.mark.faults("odd names of files")
def test_masks_of_odd_names_are_found_again(here: Path) -> None:
    from pcenet.models import create_network

    torch.manual_seed(0)
    model = create_network("pce_unet_nano", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    model.class_names = ["a b", "a  b"]
    model.save_pretrained("net")
    Path("pics").mkdir()
    for number, name in enumerate(ODD):
        noise(number).resize((16 + number, 16)).save(f"pics/{name}", "PNG")
    assert main(["predict", "net", "pics", "--out", "out", *CPU]) == 0
    records = json.loads(Path("out/predictions.json").read_text())["predictions"]
    assert len({record["mask"] for record in records}) == len(ODD)
    for record in records:
        with Image.open(record["file"]) as image, Image.open(Path("out", record["mask"])) as mask:
            assert mask.size == image.size, "sizes tell the images apart"
        assert record["shares"].keys() == {"a b", "a  b"}
        assert sum(record["shares"].values()) == pytest.approx(1)


def hostile(root: Path) -> None:
    """A set whose names command a terminal, and one that training refuses with such a name."""
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = root / "data" / split / name.replace("/", ":")
            folder.mkdir(parents=True)
            for index in range(2):
                noise(len(CLASSES) * index + number).save(folder / f"{index}{COMMANDS}.png", "PNG")
    for name in ("a", f"b{COMMANDS}"):
        (root / "bad" / name).mkdir(parents=True)
        (root / "bad" / name / f"x{COMMANDS}.heic").write_text("")
        noise(0).save(root / "bad" / name / f"{COMMANDS}.png", "PNG")
    (root / f"list{COMMANDS}.yaml").write_text("- 1\n")
    broken = root / f"net{COMMANDS}"
    broken.mkdir()
    (broken / "config.json").write_text("{")


LINES = {
    "predict": ("predict NET data/val", 0),
    "predict, left out": ("predict NET data/val bad", 0),
    "check-data": ("check-data data", 0),
    "check-data, faults": ("check-data bad", 1),
    "train, a file that is refused": ("train --data bad", 2),
    "eval, a file that is refused": ("eval NET --data bad", 2),
    "a configuration": (f"train --config list{COMMANDS}.yaml", 2),
    "a network": (f"predict net{COMMANDS} data", 2),
    "an option": (f"train --{COMMANDS}", 2),
    "a command": (f"{COMMANDS}", 2),
    "a variant": (f"compare --variants {{{json.dumps(COMMANDS)}:1}}", 2),
}


@pytest.mark.faults("a name that commands a terminal")
@pytest.mark.parametrize("what", LINES)
def test_names_are_seen_and_not_obeyed(
    what: str, classifier: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile(here)
    line, code = LINES[what]
    words = [str(classifier) if word == "NET" else word for word in line.split(" ")]
    assert main([*words, *(CPU if words[0] == "predict" else [])]) == code
    output = capsys.readouterr()
    assert_seen(output.out + output.err)
    assert "\\x1b" in output.out + output.err, "the name is shown"
    if code == 2:
        assert output.err.count("\n") == 1


@pytest.mark.faults("a name that commands a terminal")
def test_tables_of_an_evaluation(
    here: Path, save_classifier: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hostile(here)
    classes = sorted(name.replace("/", ":") for name in CLASSES)
    assert main(["eval", str(save_classifier(classes)), "--data", "data", "--out", "out", *CPU]) == 0
    output = capsys.readouterr()
    assert_seen(output.out + output.err)
    assert "\\x1b[31m" in output.out
    assert "b[red][:b]" in output.out, "no markup"
    (path,) = Path("out").iterdir()
    assert list(json.loads(path.read_text())["per_class"]) == classes


@pytest.mark.faults("a name that commands a terminal")
def test_a_model_card(classifier: Path) -> None:
    card = (classifier / "README.md").read_text(encoding="utf-8")
    assert_seen(card)
    assert "\\\\x1b" in card  # a backslash of Markdown before ours
    config = json.loads((classifier / "config.json").read_text())
    assert config["label_names"] == CLASSES
    assert_seen(str(model_card(config, "me/net", [f"## Data\n\n{COMMANDS}"])))


@pytest.mark.faults("a terminal that cannot show a name")
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_finished_command_does_not_fail(
    encoding: str, classifier: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pics").mkdir()
    noise(0).save("pics/\u65e5\u672c\u8a9e.png", "PNG")
    noise(1).save(os.fsdecode(b"pics/caf\xe9.png"), "PNG")
    Path("pics/\u65e5.png").write_bytes(b"")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    codes = [
        main(["predict", str(classifier), "pics", "--out", "out", *CPU]),
        main(["predict", str(classifier), "\u8a9e"]),
        main(["check-data", "pics"]),
    ]
    monkeypatch.undo()
    texts = [stream.buffer.getvalue().decode(encoding) for stream in streams.values()]
    assert codes == [0, 2, 1], texts
    assert "wrote out" in texts[0]
    name = "\u65e5\u672c\u8a9e" if encoding == "utf-8" else "\\u65e5\\u672c\\u8a9e"
    assert name in re.sub(r"\s*[|│]\s*\n[|│]\s*", "", texts[0])
    assert texts[1].count("\n") == 1
