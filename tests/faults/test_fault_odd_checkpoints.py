"""Checkpoints that are odd in any way: `--resume auto` passes over them and says why, `--resume PATH` is one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import Start, assert_same_run, command

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runs.manifest import fault_of
from pcenet.runtime.device import resolve_device
from pcenet.training.checkpoints import read_checkpoint, write_checkpoint
from pcenet.training.preparation import Run, prepare, resolve
from pcenet.training.run import train
from pcenet.writing import discard, remove

Change = Callable[[Path], object]
TENSOR, PARAMETER = "stem.0.0.weight", 0


def instead(make: Change) -> Change:
    """Something else in the place of the checkpoint."""

    def change(path: Path) -> None:
        remove(path)
        make(path)

    return change


def link_to(target: str) -> Change:
    return instead(lambda path: path.symlink_to(target))


PLACES: dict[str, Change] = {
    "a file": instead(lambda path: path.write_text("notes")),
    "a pipe": instead(os.mkfifo),
    "a link to a device": link_to("/dev/zero"),
    "a link to nothing": link_to("nowhere"),
    "a link to itself": link_to("step-00000006"),
    "an empty folder": instead(Path.mkdir),
}


def manifest(text: str) -> Change:
    return lambda path: (path / "manifest.json").write_text(text)


def in_place_of(name: str, make: Change) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def about_state(**values: Any) -> Change:
    return manifest(json.dumps({"files": {"state.ckpt": {"bytes": 1, "sha256": "0"} | values}}))


MANIFESTS: dict[str, Change] = {
    "nested": manifest("[" * 100_000),
    "an infinite size": manifest('{"files": {"state.ckpt": {"bytes": 1e999, "sha256": "0"}}}'),
    "a text as size": about_state(bytes="1"),
    "a negative size": about_state(bytes=-1),
    "a number as digest": about_state(sha256=1),
    "a number of 5000 digits": manifest('{"files": ' + "9" * 5000 + "}"),
    "a list": manifest("[]"),
    "files in a list": manifest('{"files": []}'),
    "no files": manifest('{"files": {}}'),
    "larger than usual": manifest('{"files": {}}' + " " * 2**16),
    "bytes": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a folder": in_place_of("manifest.json", Path.mkdir),
    "a pipe": in_place_of("manifest.json", os.mkfifo),
    "a device": in_place_of("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "the state a folder": in_place_of("state.ckpt", Path.mkdir),
    "the state a pipe": in_place_of("state.ckpt", os.mkfifo),
    "the state a device": in_place_of("state.ckpt", lambda path: path.symlink_to("/dev/zero")),
}


def put(*keys: Any, value: Any) -> Change:
    """A sealed checkpoint with another value at the end of these keys."""

    def change(path: Path) -> None:
        content = read_checkpoint(path)
        inner: Any = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value(inner[keys[-1]]) if callable(value) else value
        write_checkpoint(path, content)

    return change


def without(*keys: Any) -> Change:
    return put(*keys[:-1], value=lambda inner: {k: v for k, v in inner.items() if k != keys[-1]})


def drop(key: str) -> Change:
    def change(path: Path) -> None:
        content = read_checkpoint(path)
        del content[key]
        write_checkpoint(path, content)

    return change


def nan_weights(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.full_like(value, torch.nan) if value.is_floating_point() else value
        for name, value in content.items()
    }


OPTIMISER = ("optimizer",)
VALUES: dict[str, tuple[Change, str]] = {
    "batches a text": (put("batch", value="x"), "batch must be a whole number from 0 on, got 'x'"),
    "batches without end": (put("batch", value=10**9), "1000000000 batches are more than 2 epochs of 4 batches"),
    "batches negative": (put("batch", value=-1), "batch must be a whole number"),
    "batches true": (put("batch", value=True), "batch must be a whole number"),
    "no optimiser": (drop("optimizer"), "optimizer is missing"),
    "a text as optimiser": (put("optimizer", value="x"), "optimizer must be a mapping"),
    "moments of another shape": (
        put(*OPTIMISER, "state", PARAMETER, "exp_avg", value=torch.zeros(3)),
        "moments of parameter 0 are not of its shape",
    ),
    "moments of no number": (
        put(*OPTIMISER, "state", PARAMETER, "exp_avg", value=lambda moments: moments * torch.nan),
        "exp_avg must be a tensor of finite numbers",
    ),
    "negative squares": (
        put(*OPTIMISER, "state", PARAMETER, "exp_avg_sq", value=lambda squares: squares - 1),
        "squares of parameter 0 are negative",
    ),
    "other parameters": (put(*OPTIMISER, "param_groups", 0, "params", value=[]), "the optimiser has other parameters"),
    "another weight decay": (
        put(*OPTIMISER, "param_groups", 1, "weight_decay", value=9.0),
        "the optimiser's weight_decay is 9.0, not 0.05",
    ),
    "another step": (put("step", value=10**6), "step is 1000000, but 6 steps lie behind"),
    "steps left out without end": (put("skipped", value=7), "7 steps in a row were left out of 6"),
    "rows a number": (put("rows", value=5), "rows must be a list, got 5"),
    "rows of texts": (put("rows", 0, "val/top1", value="x"), r"rows\[0\].val/top1 must be a number"),
    "rows without a score": (without("rows", 0, "val/top1"), r"rows\[0\].val/top1 is missing"),
    "rows whose score is no number": (
        put("rows", 0, "val/top1", value=float("nan")),
        r"rows\[0\].val/top1 must be a finite number, got nan",
    ),
    "too many rows": (put("rows", value=lambda rows: rows * 2), "the rows are not those of"),
    "no rows": (drop("rows"), "rows is missing"),
    "a time that is no number": (put("elapsed", value=None), "elapsed must be a finite number"),
    "an end that is none": (put("stopped", value=3), "stopped must be"),
    "classes a number": (put("run", "classes", value=5), "run.classes must be a list, got 5"),
    "options a text": (put("run", "config", value="x"), "run.config must be a mapping"),
    "an option of a wrong type": (put("run", "config", "epochs", value="x"), "damaged or of another version"),
    "data a text": (put("run", "data", value={"train": "x"}), "run.data.train must be a number of images and a digest"),
    "no weights": (drop("averaged"), "averaged is missing"),
    "weights a list": (put("averaged", value=[]), "averaged must be a mapping"),
    "weights that are numbers": (put("averaged", TENSOR, value=1.0), "must be a tensor of finite numbers, got 1.0"),
    "weights of no number": (put("averaged", value=nan_weights), "must be a tensor of finite numbers"),
    "infinite weights of now": (
        put("model", TENSOR, value=lambda weight: weight / 0),
        "must be a tensor of finite numbers",
    ),
    "weights of another shape": (
        put("averaged", TENSOR, value=torch.zeros(3)),
        r"tensor stem.0.0.weight has shape \(3,\), expected \(8, 3, 3, 3\)",
    ),
    "a weight without memory": (
        put("averaged", TENSOR, value=torch.zeros(1).expand(10**12)),
        "must be a tensor of finite numbers",
    ),
    "a weight too few": (without("averaged", TENSOR), "tensor stem.0.0.weight is missing"),
    "a weight too many": (put("averaged", value=lambda d: d | {"x": torch.ones(1)}), "tensor x is not part"),
    "a number of averages below 0": (
        put("averages", value=-10),
        "averages must be a whole number",
    ),
    "loads of other experts": (
        put("figures", 0, "routing", "stages.1.1.body", "load", value=torch.ones(9, dtype=torch.int64)),
        "the load of layer stages.1.1.body is not of 3 experts",
    ),
    "figures that are no tensors": (put("figures", 0, "means", "sums", value={"loss": "x"}), "sums.loss must be a"),
    "another version of the format": (put("format", value=3), "format must be 4"),
    "a list": (lambda path: write_checkpoint(path, {"content": []}), "is missing"),
}
CASES = [
    *(("something else in a checkpoint's place", name, change, "step-00000006 is ") for name, change in PLACES.items()),
    *(("an odd manifest", name, change, "step-00000006 is damaged: ") for name, change in MANIFESTS.items()),
    *(("wrong values in a checkpoint", name, change, message) for name, (change, message) in VALUES.items()),
]

QUICK = {  # the others are slow together
    *(
        "a file",
        "a pipe",
        "a link to itself",
        "nested",
        "an infinite size",
        "the state a device",
        "batches without end",
    ),
    *("moments of another shape", "no rows", "rows a number", "weights of no number", "weights of another shape"),
}


def prepared(config: TrainConfig) -> Run:
    """All that a run does before it writes anything."""
    device = resolve_device("cpu")
    config = resolve(config, device)
    folder = RunFolder(config.folder)
    return prepare(config, folder, device, folder.enter(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.faults(fault), *([] if name in QUICK else [pytest.mark.slow])])
        for fault, name, *case in CASES
    ],
)
def test_auto_passes_over_it_and_a_path_to_it_is_refused(
    copied: RunFolder,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    message: str,
) -> None:
    path = copied.checkpoint(6)
    change(path)
    run = prepared(start(resume="auto"))
    assert run.checkpoint == copied.checkpoint(5)
    assert (run.position.epoch, run.position.batch, run.position.step) == (1, 1, 5)  # four batches to an epoch
    (said,) = caplog.messages
    assert re.search(f"step-00000006.*{message}".replace("step-00000006.*step-00000006", "step-00000006"), said)
    assert said.endswith("; going on from " + str(copied.checkpoint(5)))
    explicit = start("new", resume=str(path))
    capsys.readouterr()
    assert command(explicit) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: resume: ")
    assert error.count("\n") == 1
    assert "step-00000006" in error
    assert not explicit.folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(PLACES["a file"], marks=pytest.mark.faults("something else in a checkpoint's place")),
        pytest.param(VALUES["weights of no number"][0], marks=pytest.mark.faults("wrong values in a checkpoint")),
    ],
)
def test_the_run_goes_on_undisturbed_and_the_odd_one_is_gone(
    copied: RunFolder, start: Start, whole: RunFolder, change: Change
) -> None:
    change(copied.checkpoint(6))
    (copied.checkpoints / "step-99999999.old.tmp").write_text("a file like a leftover")
    (copied.checkpoints / "step-00000003").write_text("older than all")
    assert_same_run(train(start(resume="auto")), whole)
    names = [path.name for path in sorted(copied.checkpoints.iterdir())]
    assert names == ["step-00000004", "step-00000007", "step-00000008"]
    assert all(fault_of(path) is None for path in copied.steps)


@pytest.mark.faults("wrong values in a checkpoint")
def test_where_none_is_left_nothing_is_changed(copied: RunFolder, start: Start) -> None:
    for path in copied.steps:
        VALUES["no rows"][0](path)
    before = {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")}
    with pytest.raises(ValueError, match=r"no checkpoint is intact: .*6 is damaged.*rows.*4 is damaged.*rows.*start"):
        train(start(resume="auto"))
    assert {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")} == before


@pytest.mark.faults("something else in a checkpoint's place")
@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_whatever_has_the_name_of_a_checkpoint_is_replaced(tmp_path: Path, make: Change) -> None:
    path = tmp_path / "step-00000006"
    make(path)
    write_checkpoint(path, {"a": 1})
    assert fault_of(path) is None
    make(path)
    discard(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults("a checkpoint of an earlier version")
@pytest.mark.parametrize("resume", ["auto", "step-00000006"])
def test_a_run_of_an_earlier_version_is_refused_in_one_line(
    copied: RunFolder, start: Start, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    """Until version 0.2 checkpoints were Lightning's; nothing of the folder is touched."""
    write_checkpoint(copied.checkpoint(6), {"pytorch-lightning_version": "2.6.6", "global_step": 6, "callbacks": {}})
    before = {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")}
    config = start(resume="auto") if resume == "auto" else start("new", resume=str(copied.checkpoints / resume))
    assert command(config) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step-00000006 is of an earlier version of pcenet; finish its run with that version" in error
    assert {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")} == before
