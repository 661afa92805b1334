"""Runs that die anywhere go on, and end as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.runs import Start, alive, assert_same_run, at_step, have_ended, pcenet
from PIL import Image

import pcenet.runs.manifest as sealing
from pcenet.runs.folder import RunFolder
from pcenet.training.run import train


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WITHIN = [pytest.param(1), *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 5, 7))]


@pytest.mark.faults("an end within an epoch")
@pytest.mark.parametrize("step", WITHIN)
def test_resumed_within_an_epoch_is_undisturbed(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = start()
    with monkeypatch.context() as patch:
        at_step(step, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = RunFolder(config.folder)
    assert folder.steps[-1].name == f"step-{step:08d}"
    assert_same_run(train(start(resume="auto")), whole)


@pytest.mark.slow
@pytest.mark.faults("an end within an epoch")
def test_batches_that_make_one_step_together_are_never_torn_apart(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 3, "accumulate": 3, "skip_nonfinite": 2}  # eight batches: steps after 3, 6 and 8
    theirs = train(start("theirs", **options))
    with monkeypatch.context() as patch:
        at_step(1, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(start(**options))
    resumed = train(start(resume="auto", **options))
    assert [path.name for path in resumed.steps[-2:]] == ["step-00000005", "step-00000006"]
    assert_same_run(resumed, theirs)


@pytest.mark.slow
@pytest.mark.faults("kill -9 while two processes load images")
def test_killed_with_workers(start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The run goes on at once: its lock does not outlive it, though its workers do for a moment."""
    noted = tmp_path / "workers"

    def note_and_die() -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        noted.write_text(children)
        die()

    config = start(workers=2)
    with monkeypatch.context() as patch:
        at_step(6, patch, note_and_die)
        assert pcenet(config, tmp_path / "log") == -signal.SIGKILL
    workers = [int(word) for word in noted.read_text().split()]
    assert len(workers) >= 2
    assert any(map(alive, workers))  # else the lock is not what is tested
    assert_same_run(train(start(workers=2, resume="auto")), whole)
    assert have_ended(workers)


def on_call(number: int, module: Any, name: str, patch: pytest.MonkeyPatch, happens: Callable[..., object]) -> None:
    """Something happens instead of a function's call of that number, counted from 1."""
    original, calls = getattr(module, name), [0]

    def called(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return happens(*arguments) if calls[0] == number else original(*arguments, **options)

    patch.setattr(module, name, called)


def half_a_file(content: Any, file: Any) -> None:
    file.write(b"PK" * 500)
    file.flush()
    die()


# Each checkpoint flushes its file, its manifest, its folder and the folder around it.
WRITES = {
    "in the middle of a file": (torch, "save", 6, half_a_file),
    "before the file is flushed": (sealing, "flush", 21, die),
    "before the manifest is flushed": (sealing, "flush", 22, die),
    "before it gets its name": (os, "replace", 0, die),
    "after it has got its name": (os, "replace", 0, None),
    "while an old one is removed": (shutil, "rmtree", 0, die),
}


@pytest.mark.faults("kill -9 while a checkpoint is written")
@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[] if m.startswith("in the middle") else pytest.mark.slow) for m in WRITES]
)
def test_killed_while_a_checkpoint_is_written(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    config = start()
    folder = RunFolder(config.folder)
    module, name, number, happens = WRITES[moment]
    with monkeypatch.context() as patch:
        if number:
            patched = (lambda *_: die()) if happens is die else happens
            on_call(number, module, name, patch, patched)
        else:
            original = getattr(module, name)
            target = "step-00000006" if name == "replace" else "step-00000001"

            def unless_it_is_time(path: Any, *rest: Any, **options: Any) -> Any:
                if target in str(path) and Path(path).exists():
                    if happens is None:
                        original(path, *rest, **options)
                    die()
                return original(path, *rest, **options)

            patch.setattr(module, name, unless_it_is_time)
        assert pcenet(config, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    for path in folder.steps:
        assert sealing.fault_of(path) is None
    assert len(folder.steps) >= 2
    assert_same_run(train(start(resume="auto")), whole)
    assert not list(folder.path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.faults("an end within an epoch")
def test_segmentation_goes_on_within_an_epoch(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Masks, class weights and the counts of pixels, which classification does not have."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape, top in (("images", (32, 32, 3), 256), ("masks", (32, 32), 2)):
            (tmp_path / "street" / split / kind).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, top, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "street" / split / kind / f"{index}.png")
    options = {
        "task": "segment",
        "model": "pce_unet_nano",
        "model_args": {"widths": [8, 8, 8], "num_experts": 2},
        "data": str(tmp_path / "street"),
        "input_size": "32x32",
        "class_weights": "median",
        "batch_size": 1,
    }
    theirs = train(start("theirs", **options))
    with monkeypatch.context() as patch:
        at_step(6, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(start(**options))
    assert RunFolder(start().folder).steps[-1].name == "step-00000006"
    assert_same_run(train(start(resume="auto", **options)), theirs)
