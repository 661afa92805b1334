"""Checkpoints that are damaged, disks that are full, folders that others use: named, and nothing is lost."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import Start, assert_same_run, at_step, command, pcenet

import pcenet.data as data
from pcenet.runs.folder import RunFolder
from pcenet.runs.manifest import fault_of, seal
from pcenet.training import checkpoints
from pcenet.training.checkpoints import read_checkpoint, write_checkpoint
from pcenet.training.run import train


def cut(path: Path) -> None:
    os.truncate(path / "state.ckpt", 1000)


def flip(path: Path) -> None:
    """One bit in the middle of the tensors."""
    content = bytearray((path / "state.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "state.ckpt").write_bytes(content)


def rename(path: Path) -> None:
    path.rename(path.with_name(path.name + ".tmp"))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated checkpoint": (cut, r"step-00000006 is damaged: state\.ckpt has 1000 of \d+ bytes"),
    "a flipped bit": (flip, r"step-00000006 is damaged: the SHA-256 of state\.ckpt is not that of manifest\.json"),
    "a missing manifest": (
        lambda path: (path / "manifest.json").unlink(),
        r"step-00000006 is damaged: manifest\.json is missing",
    ),
    "a manifest that is none": (
        lambda path: (path / "manifest.json").write_text("{"),
        r"step-00000006 is damaged: manifest\.json cannot be read.*",
    ),
    "a missing file": (
        lambda path: (path / "state.ckpt").unlink(),
        r"step-00000006 is damaged: state\.ckpt is missing",
    ),
    "a leftover temporary": (rename, r"step-00000006\.tmp is what a write left that did not finish"),
}


@pytest.mark.parametrize("fault", [pytest.param(name, marks=pytest.mark.faults(name)) for name in FAULTS])
def test_an_explicit_path_to_a_broken_checkpoint_fails_and_says_what_is_wrong(
    copied: RunFolder, start: Start, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    breaks, message = FAULTS[fault]
    breaks(copied.steps[-1])
    (path,) = copied.checkpoints.glob("step-00000006*")
    config = start("new", resume=str(path))
    with pytest.raises(ValueError, match=f"^resume: .*{message}; give the path of an intact checkpoint"):
        train(config)
    assert not config.folder.exists()


RESUMED = ["a flipped bit", "a leftover temporary"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=[pytest.mark.faults(name), *([] if name == "a flipped bit" else [pytest.mark.slow])])
        for name in RESUMED
    ],
)
def test_auto_falls_back_to_the_newest_intact_checkpoint_and_says_so(
    copied: RunFolder, start: Start, whole: RunFolder, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    breaks, message = FAULTS[fault]
    breaks(copied.steps[-1])
    assert_same_run(train(start(resume="auto")), whole)
    (said,) = (text for text in caplog.messages if "step-00000006" in text)
    assert re.search(message, said)
    assert fault == "a leftover temporary" or said.endswith("step-00000005")
    for path in copied.steps:
        assert fault_of(path) is None
    assert not list(copied.checkpoints.glob("*.tmp"))


@pytest.mark.faults("no intact checkpoint")
def test_without_an_intact_checkpoint_auto_fails_and_changes_nothing(copied: RunFolder, start: Start) -> None:
    for path in copied.steps:
        flip(path)
    before = {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")}
    with pytest.raises(ValueError, match=r"no checkpoint is intact: .*step-00000006 is damaged.*step-00000004 is"):
        train(start(resume="auto"))
    assert {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")} == before


class Attack:
    """What runs when a pickle of it is loaded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.faults("a checkpoint that runs code")
def test_a_checkpoint_never_runs_code(
    copied: RunFolder, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest is right: who can write the one can write the other."""
    sentinel = tmp_path / "was here"
    content = torch.load(copied.steps[-1] / "state.ckpt", weights_only=True)
    write_checkpoint(copied.steps[-1], content | {"more": Attack(sentinel)})
    torch.load(copied.steps[-1] / "state.ckpt", weights_only=False)
    assert sentinel.exists()  # the attack works where nobody guards against it
    sentinel.unlink()
    explicit = start("new", resume=str(copied.steps[-1]))
    with pytest.raises(ValueError, match=r"step-00000006 is damaged or no checkpoint .*UnpicklingError"):
        train(explicit)
    (copied.steps[-1] / "state.ckpt").write_bytes(pickle.dumps(Attack(sentinel)))  # as torch wrote them long ago
    (copied.steps[-1] / "manifest.json").unlink()
    seal(copied.steps[-1])
    with pytest.raises(ValueError, match=r"step-00000006 is damaged or no checkpoint"):
        train(explicit)
    train(start(resume="auto"))
    assert "step-00000006 is damaged or no checkpoint" in caplog.text
    assert not sentinel.exists()


@pytest.mark.faults("a manifest that points elsewhere")
def test_a_manifest_reads_nothing_elsewhere(copied: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    manifest = copied.steps[-1] / "manifest.json"
    manifest.write_text(json.dumps({"files": {"../../../secret": {"bytes": 1, "sha256": ""}}}))
    assert fault_of(copied.steps[-1]) == "is damaged: ../../../secret is missing"


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 30 kB, as if there were no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.faults("a full disk")
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(copied: RunFolder) -> None:
    content = read_checkpoint(copied.steps[-1])
    target = copied.checkpoint(7)
    with small_files(), pytest.raises(OSError, match="File too large") as error:
        write_checkpoint(target, content)
    assert Path(error.value.filename).is_relative_to(target)
    assert sorted(path.name for path in copied.checkpoints.iterdir()) == [f"step-0000000{step}" for step in (4, 5, 6)]
    assert all(fault_of(path) is None for path in copied.steps)


@pytest.mark.slow
@pytest.mark.faults("a full disk")
def test_a_disk_that_fills_up_while_training(
    start: Start, whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk of its own, with room for three checkpoints, but not for a fourth while it is written."""
    room = 7 * (whole.steps[-1] / "state.ckpt").stat().st_size // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=False).returncode:
        pytest.skip("this user may mount nothing")
    try:
        config = start(out=str(disk / "run"))
        assert command(config) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"pcenet: error: .*step-0000000\d.*: No space left on device; make room", error)
        folder = RunFolder(config.folder)
        assert len(folder.steps) >= 2
        assert all(fault_of(path) is None for path in folder.steps)
        assert not list(folder.path.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert_same_run(train(start(out=str(disk / "run"), resume="auto")), whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.faults("a read-only disk")
def test_a_disk_that_becomes_read_only(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=False).returncode:
        pytest.skip("this user may mount nothing")
    try:
        config = start(out=str(disk / "run"))
        original = checkpoints.write_checkpoint

        def refuse(path: Path, content: Any) -> None:
            if path.name == "step-00000006":
                raise OSError(30, "Read-only file system", str(path))
            original(path, content)

        with monkeypatch.context() as patch:
            patch.setattr("pcenet.training.loop.write_checkpoint", refuse)
            assert command(config) == 2
        assert "step-00000006: Read-only file system; choose another path" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert command(start(out=str(disk / "run"), resume="auto")) == 2
        assert "Read-only file system; choose another path" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert_same_run(train(start(out=str(disk / "run"), resume="auto")), whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.faults("two runs in one folder")
def test_a_folder_that_another_process_trains_in_is_refused(copied: RunFolder, start: Start) -> None:
    with open(copied.lock, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"out: another process is training in .*run; choose another folder"):
            train(start(resume="auto"))


@pytest.mark.slow
@pytest.mark.faults("two runs in one folder")
def test_a_run_holds_its_folder_while_it_trains(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run is refused, and harms neither the folder nor the first."""
    log, seen = tmp_path / "log", []
    config = start(epochs=1)

    def second() -> None:
        seen.append(pcenet(start(epochs=1, resume="auto"), log))

    at_step(1, monkeypatch, second)
    folder = train(config)
    assert seen == [2], log.read_text()
    assert "another process is training in" in log.read_text()
    assert folder.finished


@pytest.mark.faults("two runs in one folder")
def test_of_two_that_begin_at_once_one_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has made the folder since ours looked."""
    config = start()

    def begin(_: Any) -> None:
        config.folder.mkdir()
        (config.folder / "config.yaml").write_text("model: pce_nano\n")

    monkeypatch.setattr("pcenet.training.run.announce", begin)
    with pytest.raises(ValueError, match="exists and is never overwritten"):
        train(config)
    assert sorted(path.name for path in config.folder.iterdir()) == [".lock", "config.yaml"]


@pytest.mark.faults("resuming with other settings")
def test_safe_changes_are_listed_and_unsafe_ones_refused(
    copied: RunFolder, start: Start, whole: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, message in (
        ({"batch_size": 12, "workers": 2}, "batch_size 6 -> 12"),
        ({"epochs": 3}, "epochs 2 -> 3"),
        ({"model_args": {"widths": [8, 8, 16]}}, "model_args"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"started with other options ({message}")):
            train(start(resume="auto", **changes))
    assert_same_run(train(start(resume="auto", checkpoint_minutes=5.0, skip_nonfinite=3)), whole)
    assert "changed since then: checkpoint_minutes 0.0 -> 5.0, skip_nonfinite 0 -> 3" in capsys.readouterr().out


@pytest.mark.faults("data that have changed since the checkpoint")
@pytest.mark.parametrize("change", ["one more", "another name"])
def test_data_that_have_changed_are_refused(
    copied: RunFolder, start: Start, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    image = other / "train" / "red" / "0.png"
    if change == "one more":
        shutil.copy(image, image.with_name("00.png"))
        message = "train had 24 images and has 25"
    else:
        image.rename(image.with_name("9.png"))
        message = "train has as many images, but not the same file names or labels"
    open_source = data.open_source
    monkeypatch.setattr(data, "open_source", lambda path, split, **_: open_source(other, split))
    with pytest.raises(ValueError, match=f"the data of .*step-00000006 have changed: .*: {message}; put them back"):
        train(start(resume="auto"))
