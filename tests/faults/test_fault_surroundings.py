"""What goes wrong around a run: processes that load, loggers, files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.runs import Start, at_step, pcenet
from tensorboard.summary.writer.record_writer import RecordWriter

from pcenet.data.loaders import naming_dead_workers
from pcenet.runs.folder import RunFolder
from pcenet.training.run import train
from pcenet.training.trackers import TensorBoard


@pytest.mark.faults("a process that loads images dies")
def test_a_process_that_dies_ends_the_run_with_a_message(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, log = start(workers=1), tmp_path / "log"

    def kill_workers() -> None:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    with monkeypatch.context() as patch:
        at_step(2, patch, kill_workers)
        assert pcenet(config, log) == 2, log.read_text()
    error = log.read_text().splitlines()[-1]
    assert error.startswith("pcenet: error: workers: a process that loads images has died (")
    assert error.endswith("try fewer --workers")
    assert "Traceback" not in log.read_text()
    # It is noticed during the step or, where the next batch had been loaded before, during the one after; or while the
    # step's checkpoint was written, which is then not there.
    assert RunFolder(config.folder).steps[-1].name in ("step-00000001", "step-00000002", "step-00000003")


def interrupted(reason: str) -> None:
    """A signal's error comes while a checkpoint is written, and closing the half-written file fails, too."""
    with naming_dead_workers():
        try:
            raise RuntimeError(reason)
        finally:
            raise RuntimeError("unexpected pos 327040 vs 326928")


@pytest.mark.faults("a process that loads images dies")
def test_a_death_that_interrupts_something_is_named_all_the_same() -> None:
    with pytest.raises(ValueError, match=r"has died \(DataLoader worker \(pid 5\) is killed by signal: Killed\)"):
        interrupted("DataLoader worker (pid 5) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="unexpected pos"):
        interrupted("something else")


@pytest.mark.faults("a data file that vanishes")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_is_named(
    start: Start, whole: RunFolder, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    data = tmp_path / "pictures"
    shutil.copytree(pictures, data)
    config, log = start(data=str(data), workers=workers), tmp_path / "log"
    with monkeypatch.context() as patch:
        at_step(2, patch, lambda: shutil.move(data / "train" / "red", data / "red"))
        assert pcenet(config, log) == 2, log.read_text()
    error = log.read_text().splitlines()[-1]
    assert error.startswith(f"pcenet: error: {data}/train/red/")
    assert error.endswith("png: the file cannot be read (No such file or directory).")
    shutil.move(data / "red", data / "train" / "red")
    resumed = train(start(data=str(data), workers=workers, resume="auto"))
    assert (resumed.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


@pytest.mark.faults("an archive that is replaced while it is in use")
@pytest.mark.slow
@pytest.mark.parametrize("change", ["other names", "other pixels", "removed"])
def test_an_archive_that_is_replaced_is_named(
    start: Start, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    """The processes that load images for validation open it anew."""
    data, archive = tmp_path / "pictures", tmp_path / "pictures.zip"
    shutil.copytree(pictures, data)
    shutil.make_archive(str(data), "zip", data)

    def replace() -> None:
        archive.unlink()
        if change == "other names":
            (data / "val/red").rename(data / "val/yellow")
        shutil.copy(data / "train/red/0.png", data / "train/red/1.png")
        if change != "removed":
            shutil.make_archive(str(data), "zip", data)

    config, log = start(data=str(archive), workers=2), tmp_path / "log"
    with monkeypatch.context() as patch:
        at_step(2, patch, replace)
        assert pcenet(config, log) == 2, log.read_text()
    error = log.read_text().splitlines()[-1]
    assert error.startswith(f"pcenet: error: {archive}: ")
    assert ("No such file" if change == "removed" else "the archive has changed while it was in use") in error
    assert "Traceback" not in log.read_text()


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def no_folder(start: Start, patch: pytest.MonkeyPatch) -> None:
    """A file lies where TensorBoard's folder should be."""
    original = RunFolder.create

    def create(self: RunFolder, *arguments: Any) -> None:
        original(self, *arguments)
        (self.logs / "tensorboard").touch()

    patch.setattr(RunFolder, "create", create)


LOGGERS: dict[str, Callable[[Start, pytest.MonkeyPatch], None]] = {
    "when it begins": no_folder,
    "in its thread": lambda _, patch: patch.setattr(RecordWriter, "write", refuse),
    "when it is called": lambda _, patch: patch.setattr(TensorBoard, "log", refuse),
    "at its end": lambda _, patch: patch.setattr(TensorBoard, "close", refuse),
}


@pytest.mark.faults("a logger that fails")
@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[] if name == "in its thread" else pytest.mark.slow) for name in LOGGERS]
)
def test_a_logger_that_fails_is_one_warning(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    LOGGERS[moment](start, monkeypatch)
    assert train(start(epochs=1)).finished
    (warning,) = (text for text in caplog.messages if "TensorBoard" in text)
    assert "training goes on without it" in warning
