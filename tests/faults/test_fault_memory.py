"""Memory that runs out is a message, and takes nothing from a result that is complete."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from faults.runs import Start, at_step, command

from pcenet import cli
from pcenet.runs.folder import RunFolder
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.training.run import draw, train


def of_python() -> None:
    raise MemoryError


def of_numpy() -> None:
    np.empty(2**62, np.uint8)


def of_torch() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def of_cudnn() -> None:
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def of_the_system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def in_a_worker() -> None:
    raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback:\nalloc: can't allocate memory")


KINDS = [of_python, of_numpy, of_torch, of_a_gpu, of_cudnn, of_the_system, in_a_worker]


@pytest.mark.faults("memory runs out")
@pytest.mark.parametrize("happens", KINDS)
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_memory_that_runs_out_is_one_line_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, happens: Callable[[], None]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, name, lambda _: happens())
    assert cli.main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: memory ran out; ")
    assert error.count("\n") == 1
    asked = "--batch-size" in error
    assert asked == (name in ("train", "compare", "eval", "predict", "explain", "bench"))  # which have the option
    assert ("--resume auto" in error) == (name == "train")


@pytest.mark.faults("memory runs out")
def test_other_errors_are_none_of_memory() -> None:
    for error in (
        RuntimeError("shapes differ"),
        OSError(errno.ENOSPC, "full"),
        ValueError("out of memory"),
        KeyError(),
    ):
        assert not ran_out_of_memory(error)


@pytest.mark.faults("memory runs out")
def test_a_run_goes_on_from_where_memory_ran_out(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start()
    with monkeypatch.context() as patch:
        at_step(2, patch, of_torch)
        assert command(config) == 2
    assert "pcenet: error: memory ran out; give a smaller --batch-size" in capsys.readouterr().err
    assert RunFolder(config.folder).steps[-1].name == "step-00000002"
    assert train(start(resume="auto")).finished


@pytest.mark.faults("pictures that cannot be drawn")
@pytest.mark.parametrize("happens", [of_python, of_torch, lambda: 1 / 0])
def test_a_finished_run_is_not_lost_with_its_pictures(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    happens: Callable[[], Any],
) -> None:
    config = start(epochs=1)
    monkeypatch.setattr("pcenet.training.run.draw", draw)
    monkeypatch.setattr("pcenet.training.run.training_sheet", lambda _: happens())
    monkeypatch.setattr("pcenet.training.run.pictures_of", lambda *_: happens())
    assert command(config) == 0
    folder = RunFolder(config.folder)
    assert folder.finished
    assert not folder.pictures.exists()
    first, last = (message for message in caplog.messages if not message.startswith("routers at evaluation"))
    reason = "ZeroDivisionError: division by zero" if happens not in KINDS else "memory ran out"
    assert first == last == f"{reason}; {folder.pictures} was not drawn"
    assert f"model: {folder.model}" in capsys.readouterr().out
