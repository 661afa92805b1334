"""``pcenet predict`` on videos: frames in order, their time, and what a damaged file costs."""

from __future__ import annotations

import csv
import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.cli import main
from pcenet.data import eval_transform
from pcenet.data.files import FolderTree
from pcenet.inference.inputs import InputFile
from pcenet.inference.videos import read_frames
from pcenet.models import load_model

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'pcenet[video]'")

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
RATE = 5


def film(path: str | Path, frames: Sequence[Image.Image], codec: str = "png", pix_fmt: str = "rgb24") -> None:
    """Write a video; that of the default codec has exactly these pixels."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def input_of(path: Path) -> InputFile:
    return InputFile(str(path), FolderTree(path.parent), path.name)


def results(folder: str = "predictions") -> dict[str, Any]:
    return json.loads(Path(folder, "predictions.json").read_text())


def test_each_frame_has_a_row_with_its_time(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames = [noise(number) for number in range(6)]
    lay_out({"pics/z.png": encode(noise(9)), "pics/notes.txt": b"a note"})
    film("pics/clips/a.mov", frames)
    for size in ("1", "4"):
        assert (
            main(["predict", str(model_folder), "pics", "--top", "7", "--batch-size", size, "--out", size, *CPU]) == 0
        )
    image, *found = results("1")["predictions"]
    assert (image["file"], "time" in image) == ("pics/z.png", False)
    assert [(each["file"], each["time"]) for each in found] == [
        ("pics/clips/a.mov", number / RATE) for number in range(6)
    ]
    model = load_model(model_folder)
    labels = set()
    for each, same, frame in zip(found, results("4")["predictions"][1:], frames, strict=True):
        with torch.inference_mode():
            expected = model(eval_transform(32)(frame)[None]).softmax(1)[0].tolist()
        for record in (each, same):
            by_class = {entry["label"]: entry["probability"] for entry in record["top"]}
            assert [by_class[name] for name in model.class_names] == pytest.approx(expected, abs=1e-5)
        labels.add(each["label"])
    assert len(labels) > 1, "the network must tell the frames apart for this test to mean something"
    with open("1/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["file", "time", "label"]
    assert [row["time"] for row in rows] == ["", "0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [row["label"] for row in rows] == [image["label"], *(each["label"] for each in found)]
    output = capsys.readouterr().out
    assert "7 of 7 images done" in output
    assert "7 predicted, 1 left out" in output
    assert "pics/clips/a.mov at 0.20 s" in output


def test_each_frame_has_a_mask(
    segmenter_folder: Path, noise: Callable[..., Image.Image], lay_out: Callable[..., None]
) -> None:
    lay_out({})
    frames = [noise(number, 60, 40) for number in range(3)]
    film("a.mov", frames)
    for number, frame in enumerate(frames):
        frame.save(f"{number}.png")
    assert main(["predict", str(segmenter_folder), "a.mov", "--out", "film", *CPU]) == 0
    assert (
        main(["predict", str(segmenter_folder), *(f"{number}.png" for number in range(3)), "--out", "each", *CPU]) == 0
    )
    filmed, alone = results("film")["predictions"], results("each")["predictions"]
    assert [each["mask"] for each in filmed] == [f"masks/a.mov/00000{number}.png" for number in range(3)]
    assert [each["overlay"] for each in filmed] == [f"overlays/a.mov/00000{number}.jpg" for number in range(3)]
    for one, other in zip(filmed, alone, strict=True):
        for kind in ("mask", "overlay"):
            pictures = [np.asarray(Image.open(Path(out, each[kind]))) for out, each in (("film", one), ("each", other))]
            assert np.array_equal(*pictures)


def test_frames_are_upright(tmp_path: Path) -> None:
    frame = Image.new("RGB", (8, 6), "blue")
    frame.paste("red", (0, 0, 4, 6))
    film(tmp_path / "a.mov", [frame])
    content = (tmp_path / "a.mov").read_bytes()
    one = 1 << 16
    plain, turned = (
        struct.pack(">9i", *each, 0, 0, 1 << 30) for each in ((one, 0, 0, 0, one, 0), (0, one, 0, -one, 0, 0))
    )
    at = content.index(plain, content.index(b"tkhd"))
    # x' = -y, y' = x, y downwards: a quarter clockwise, which brings the left to the top.
    (tmp_path / "turned.mov").write_bytes(content[:at] + turned + content[at + len(plain) :])
    (batch,) = read_frames(input_of(tmp_path / "turned.mov"), eval_transform(8), batch_size=4)
    picture = batch.files[0].image()
    assert picture.size == (6, 8)
    assert [picture.getpixel((3, y)) for y in (1, 6)] == [(255, 0, 0), (0, 0, 255)]


def test_few_frames_are_in_memory(tmp_path: Path) -> None:
    film(tmp_path / "a.mov", [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(40)])
    read: list[int] = []

    def transform(image: Image.Image) -> torch.Tensor:
        read.append(image.getpixel((0, 0))[0])
        return torch.zeros(3, 8, 8)

    batches = read_frames(input_of(tmp_path / "a.mov"), transform, batch_size=256)
    assert len(next(batches).files) == 16
    assert read == list(range(16))
    assert [len(batch.files) for batch in batches] == [16, 8]
    assert read == list(range(40))


def test_a_damaged_video_costs_one_line(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lay_out({"pics/a.png": encode(noise(0)), "pics/empty.mp4": b"", "pics/text.mp4": b"a text", "pics.zip!a.mov": b""})
    frames = [noise(number) for number in range(8)]
    film("pics/good.mov", frames[:2])
    film("all.mov", frames)
    content = Path("all.mov").read_bytes()
    Path("pics/cut.mov").write_bytes(content[: len(content) // 2])  # the index is at the end
    fifth = [at for at in range(len(content)) if content.startswith(b"\x89PNG", at)][5]
    Path("pics/damaged.mov").write_bytes(content[:fifth] + bytes(500) + content[fifth + 500 :])
    Path("pics/list.mp4").write_text("ffconcat version 1.0\nfile good.mov\n")  # which would lead to another file
    os.mkfifo("pics/pipe.mp4")
    with av.open("pics/sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    film("pics/wide.mov", [Image.new("RGB", (330, 10))])
    film("pics/large.mov", [Image.new("RGB", (400, 400))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 159_999)
    assert main(["predict", str(model_folder), "pics", "pics.zip", *CPU]) == 0
    found = results()
    assert [Path(each["file"]).name for each in found["predictions"]] == [
        "a.png",
        *["damaged.mov"] * 5,
        *["good.mov"] * 2,
    ]
    reasons = {Path(each["file"]).name: each["reason"] for each in found["left_out"]}
    output = capsys.readouterr().out
    for name, reason in {
        "a.mov": "it is not named like an image",
        "cut.mov": "the video cannot be read, or is damaged (Invalid data",
        "damaged.mov": "is damaged (Invalid data found when processing input); predicted are the 5 frames before that",
        "empty.mp4": "the video cannot be read",
        "large.mov": "its frames have 400 x 400 pixels, more than 159999",
        "pipe.mp4": "it is no regular file",
        "sound.mp4": "it has no video stream, or is cut off",
        "list.mp4": "the video cannot be read, or is damaged (Invalid argument",
        "text.mp4": "the video cannot be read, or is damaged (Invalid data",
        "wide.mov": "its longer side may be 32 times the shorter one at most",
    }.items():
        assert reason in reasons.pop(name), name
        assert output.count(f"{name}: ") == 1
    assert reasons == {}


def test_without_the_library_images_are_predicted_all_the_same(
    model_folder: Path,
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    lay_out: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lay_out({"pics/a.png": encode(noise(0))})
    film("pics/b.mov", [noise(1)])
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["predict", str(model_folder), "pics", *CPU]) == 0
    assert [each["file"] for each in results()["predictions"]] == ["pics/a.png"]
    assert "left out: pics/b.mov: videos need PyAV: pip install 'pcenet[video]'" in capsys.readouterr().out
    assert main(["predict", str(model_folder), "pics/b.mov", *CPU]) == 1


def test_frames_that_grow_on_the_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may change its resolution: what was small when it was opened says nothing of later frames."""
    parts = []
    for side in (64, 256):
        part = tmp_path / f"{side}.ts"
        film(
            part, [Image.new("RGB", (side, side), (number * 40, 0, 0)) for number in range(3)], "mpeg2video", "yuv420p"
        )
        parts.append(part.read_bytes())
    path = tmp_path / "grows.ts"
    path.write_bytes(b"".join(parts))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    batches = list(read_frames(input_of(path), eval_transform(32), batch_size=2))
    assert {frame.picture.size for batch in batches for frame in batch.files} == {(64, 64)}
    (left,) = batches[-1].left_out
    assert "its frames have 256 x 256 pixels, more than 4096; predicted are the" in left.reason
