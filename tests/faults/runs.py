"""Runs that take a second, what is the same in two of them, and processes that come to grief."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcenet.cli import main
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.training.loop import Trainer

TIMES = {"train/epoch_seconds", "train/images_per_second", "epoch_seconds", "images_per_second"}
PATIENCE = 60  # seconds; only what hangs takes as long

Start = Callable[..., TrainConfig]


def options_of(pictures: Path, out: str, **changes: Any) -> TrainConfig:
    """A run of two epochs of four steps in which chance matters, with accumulation left out."""
    values: dict[str, Any] = {
        "data": str(pictures),
        "out": out,
        "model": "pce_nano",
        "model_args": {"widths": [8, 8, 16], "num_experts": 3, "capacity_factor": 1.0, "balancing": "none"},
        "epochs": 2,
        "batch_size": 6,
        "drop": 0.2,
        "drop_path": 0.2,
        "router_noise": 0.1,
        "precision": "fp32",
        "device": "cpu",
        "workers": 0,
        "checkpoint_minutes": 0.0,
    }
    return TrainConfig(**(values | changes))


def state_of(folder: RunFolder) -> dict[str, Any]:
    """Everything that the last checkpoint holds, tensors by their bytes; times, and what names the run, aside."""
    content = torch.load(folder.steps[-1] / "state.ckpt", weights_only=True)
    del content["run"]["config"], content["seconds"], content["elapsed"]
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = (
                value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
            )
        elif isinstance(value, dict):
            for key, part in value.items():
                if key not in TIMES:
                    walk(f"{name}/{key}", part)
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                walk(f"{name}/{index}", part)
        else:
            found[name] = value

    walk("", content)
    return found


def rows_of(folder: RunFolder) -> list[dict[str, str]]:
    with open(folder.logs / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def assert_same_run(ours: RunFolder, theirs: RunFolder) -> None:
    """Weights, averaged weights, optimiser, counters, figures: bit for bit."""
    left, right = state_of(ours), state_of(theirs)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
    assert {"optimizer", "model", "averaged", "figures"} <= {name.split("/")[1] for name in left}
    assert rows_of(ours) == rows_of(theirs)
    one, other = (json.loads(folder.metrics.read_text()) for folder in (ours, theirs))
    assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    weights = "model.safetensors"
    assert (ours.model / weights).read_bytes() == (theirs.model / weights).read_bytes()


def arguments_of(config: TrainConfig) -> list[str]:
    """The command line of a run."""
    defaults, words = TrainConfig(), ["train"]
    for name, value in vars(config).items():
        if value != getattr(defaults, name):
            words.append(f"--{name.replace('_', '-')}")
            if not isinstance(value, bool):
                words.append(json.dumps(value) if value is None or isinstance(value, dict) else str(value))
    return words


def in_a_process(work: Callable[[], object], log: Path | None = None) -> int:
    """Do something in a forked process, the first of a group of its own; its exit code, or minus the signal."""

    def begin() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in its background ignore it
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.exit(work())

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    assert process.pid is not None
    if not have_ended([process.pid]):  # join with a time-out would wait for the process's own processes, too
        process.kill()
        raise AssertionError(f"it hangs; {log.read_text() if log else ''}")
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def command(config: TrainConfig) -> int:
    """``pcenet train``; its exit code."""
    return main(arguments_of(config))


def pcenet(config: TrainConfig, log: Path) -> int:
    """`command` in a process of its own; what it prints goes to a file."""
    return in_a_process(lambda: command(config), log)


def have_ended(processes: list[int]) -> bool:
    """Wait until processes that are not ours have ended."""
    for process in processes:
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = poll.poll(1000 * PATIENCE)
        os.close(descriptor)
        if not ended:
            return False
    return True


def alive(process: int) -> bool:
    """Whether there is such a process now, one that waits to be forgotten aside."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def at_step(step: int, patch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens at the beginning of an optimiser's step; 0 is the first."""
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        if self.state.step == step:
            happens()
        return original(self, batch, number)

    patch.setattr(Trainer, "batch_loss", batch_loss)
