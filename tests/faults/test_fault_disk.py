"""A disk that fills up while results are written: the path is named, nothing half stays, the command works later."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.cli import main
from pcenet.models import SavableModel, create_network
from pcenet.writing import filling, replacing, write_json

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write that does fails, as on a full disk, and knows no name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path) -> Path:
    """A working folder with images and networks for either task."""
    monkeypatch.chdir(tmp_path)
    for name, classes in (("pce_nano", ["blue", "green", "red"]), ("pce_unet_nano", ["sky", "road"])):
        torch.manual_seed(0)
        size = {"input_size": (3, 32, 32)}
        arguments = {"widths": [8, 8, 8], "num_experts": 2, "pretrained_cfg_overlay": size}
        model = create_network(name, num_classes=len(classes), **arguments)
        model.class_names = classes
        model.save_pretrained(name)
    for split, folder in (("train", "images"), ("train", "masks"), ("val", "images"), ("val", "masks")):
        Path("street", split, folder).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 2, (32, 32), np.uint8)
            Image.fromarray(pixels).save(Path("street", split, folder, f"{number}.png"))
    Path("pictures").symlink_to(pictures)
    return tmp_path


# Command, room in bytes, and the path that is named.
COMMANDS = {
    "predict": ("predict pce_nano pictures/val --out out/new", 400, "out/new"),
    "predict, masks": ("predict pce_unet_nano pictures/val --out out", 600, "out"),
    "predict, by default": ("predict pce_nano pictures/val", 400, "predictions"),
    "eval": ("eval pce_nano --data pictures --out out", 100, "out/eval-pictures-val.json"),
    "check-data, JSON": ("check-data pictures --json report.json", 100, "report.json"),
    "check-data, sheet": ("check-data pictures --out out", 100, "out/samples.png"),
    "push": ("push RUN --repo me/net --dry-run out --images 0", 300, "out/model.safetensors"),
    "push, card": ("push RUN --repo me/net --dry-run out --images 0", 10**9, "out/README.md"),
    "explain": ("explain pce_nano --data pictures --out out --shown 1 --intervention-images 0", 2000, "out"),
    "export, pt2": ("export pce_nano --format pt2 --out out/net.pt2", 5000, "out"),
    "export, ONNX": ("export pce_nano --out out/net.onnx", 5000, "out"),
}
SLOW = ("explain", "export, pt2", "export, ONNX")


@pytest.mark.faults("a full disk while results are written")
@pytest.mark.parametrize("what", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in COMMANDS])
def test_the_path_is_named_and_the_repetition_works(
    what: str,
    place: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, room, named = COMMANDS[what]
    words = line.split()
    if "RUN" in words:
        words[words.index("RUN")] = str(request.getfixturevalue("whole").path)
    if words[0] in ("predict", "eval", "explain"):
        words += CPU
    before = files(place)
    with monkeypatch.context() as patch, full_disk(room):
        if what == "push, card":
            refuse_texts(patch, "README.md")
        code = main(words)
    warnings = ("pcenet: warning: routers at evaluation",)  # of networks that were trained for a moment
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith(warnings))
    assert code == 2, error
    assert error.startswith(f"pcenet: error: {named}: "), error
    assert error.count("\n") == 1
    assert ": No space left on device; make room" in error or ": File too large; " in error
    assert files(place) - before <= {"out"}, "no more than a folder that a file should have gone into"
    assert main(words) == 0
    assert named in files(place)
    assert not [path for path in files(place) if path.endswith(".tmp")]


def refuse_texts(patch: pytest.MonkeyPatch, name: str) -> None:
    """There is no room for files of a name."""
    original = Path.write_bytes

    def write(self: Path, content: bytes) -> int:
        if self.name.startswith(name):
            original(self, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, content)

    patch.setattr(Path, "write_bytes", write)


def fill(path: Path) -> None:
    path.mkdir()
    (path / "a").write_bytes(b"x" * 50)
    (path / "b").write_bytes(b"x" * 5000)


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "JSON": (lambda path: write_json(path, ["x"] * 500), ""),
    "a folder": (lambda path: _replace(path, fill), ""),
    "a file below a folder": (lambda path: _fill(path), ""),
    "a network": (lambda path: _network().save_pretrained(path), "/config.json"),
}


def _network() -> SavableModel:
    return create_network("pce_nano", num_classes=2, widths=[8, 8, 8])


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    with replacing(path) as temporary:
        write(temporary)


def _fill(path: Path) -> None:
    with filling(path) as folder:
        (folder / "first").write_bytes(b"x")
        fill(folder / "sub")


@pytest.mark.faults("a full disk while results are written")
@pytest.mark.parametrize("kind", WRITERS)
def test_writers_name_what_they_were_to_write(kind: str, tmp_path: Path) -> None:
    write, below = WRITERS[kind]
    with full_disk(1000), pytest.raises(OSError, match="File too large") as error:
        write(tmp_path / "target")
    assert error.value.filename == f"{tmp_path}/target{below}"
    assert error.value.errno == errno.EFBIG
    assert files(tmp_path) <= ({"target"} if kind == "a network" else set())
    write(tmp_path / "target")
    assert (tmp_path / "target").exists()


@pytest.mark.faults("a full disk while results are written")
def test_what_was_there_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    before = files(tmp_path)
    for write in (lambda: write_json(tmp_path / "a.json", ["x"] * 500), lambda: _fill(tmp_path / "folder")):
        with full_disk(1000), pytest.raises(OSError, match="File too large"):
            write()
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        _replace(tmp_path / "folder", fill)
    assert files(tmp_path) == before
    assert json.loads((tmp_path / "a.json").read_text()) == 1


@pytest.mark.faults("a full disk while results are written")
def test_errors_of_others_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, filling(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    assert error.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(ConnectionError) as lost, filling(tmp_path / "out"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert lost.value.filename is None
    assert files(tmp_path) == set()
