"""Several processes that train together: one that fails ends all; any number goes on with what they have written."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import Start, arguments_of, assert_same_run, at_step, command, have_ended
from several import in_processes, printed

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.distributed import agreeing
from pcenet.runtime.distributed import together as in_a_group
from pcenet.runtime.launcher import LOST, Launcher, ranks_of_environment
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.loop import Trainer
from pcenet.training.run import train

PROCESSES = {"batch_size": 3, "process_timeout": 0.5}  # each; six images in a step, as one process has them in `start`
CHANCELESS = {
    "augment": "none",
    "drop": 0.0,
    "drop_path": 0.0,
    "router_noise": 0.0,
    "sync_batch_norm": True,
    "model_args": {"widths": [8, 8, 16], "num_experts": 3, "capacity_factor": None},
}


def together(config: TrainConfig, log: Path, count: int = 2) -> list[int]:
    """``pcenet train`` in several processes; their exit codes."""
    return in_processes(lambda: command(config), log, count)


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def in_process(rank: int, number: signal.Signals) -> None:
    """Send one of the processes, where this is it, a signal."""
    if own_rank() == rank:
        os.kill(os.getpid(), number)


@pytest.mark.faults("one of several processes is killed")
def test_the_others_end_when_one_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, log = start(**PROCESSES), tmp_path / "log"
    with monkeypatch.context() as patch:
        at_step(2, patch, lambda: in_process(1, signal.SIGKILL))
        codes = together(config, log)
    assert codes == [LOST, -signal.SIGKILL], printed(log)
    assert "pcenet: error: another process cannot be reached any longer" in printed(log)[0]
    assert "Traceback" not in printed(log)[0]
    assert [path.name for path in RunFolder(config.folder).steps] == ["step-00000001", "step-00000002"]


@pytest.mark.slow
@pytest.mark.faults("one of several processes is killed")
def test_the_launcher_names_the_one_that_was_killed(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """It is the first, by which others are reached."""
    config = start(**PROCESSES, devices=2)
    script = (
        "import sys; from faults.test_fault_processes import die_at; import pcenet.cli;"
        "die_at(2, 0); sys.exit(pcenet.cli.main(sys.argv[1:]))"
    )
    launcher = Launcher([sys.executable, "-c", script, *arguments_of(config)], 2)
    assert launcher.run() == 137
    assert "pcenet: error: process 0 of 2 was ended by SIGKILL, for lack of memory perhaps" in capfd.readouterr().err
    assert launcher.killed == []  # the other has ended by itself


def die_at(step: int, rank: int) -> None:
    at_step(step, pytest.MonkeyPatch(), lambda: in_process(rank, signal.SIGKILL))


@pytest.mark.slow
@pytest.mark.faults("one of several processes is killed")
def test_the_program_from_the_command_to_its_exit_code(start: Start) -> None:
    assert command(start(**PROCESSES, devices=2, epochs=1)) == 0
    assert RunFolder(start().folder).finished


@pytest.mark.slow
@pytest.mark.faults("one of several processes hangs")
def test_one_that_does_not_answer_is_killed_and_named(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    config = start(**PROCESSES | {"process_timeout": 0.05}, devices=2)
    script = (
        "import sys; from faults.test_fault_processes import stop_at; import pcenet.cli;"
        "stop_at(2, 1); sys.exit(pcenet.cli.main(sys.argv[1:]))"
    )
    launcher = Launcher([sys.executable, "-c", script, *arguments_of(config)], 2, grace=1.0)
    assert launcher.run() == 137
    assert "process 1 of 2 did not answer and was killed" in capfd.readouterr().err
    assert have_ended([process.pid for process in launcher.processes])


def stop_at(step: int, rank: int) -> None:
    at_step(step, pytest.MonkeyPatch(), lambda: in_process(rank, signal.SIGSTOP))


@pytest.mark.slow
@pytest.mark.faults("a signal to one of several processes, or to all")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_signal_ends_all_after_the_same_step(
    number: signal.Signals, ranks: tuple[int, ...], start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With chance, and statistics of each process's own: the run that goes on is the undisturbed one, bit for bit."""
    options: dict[str, Any] = {**PROCESSES, "checkpoint_minutes": None}
    undisturbed = start("undisturbed", **options)
    assert together(undisturbed, tmp_path / "log 1") == [0, 0], printed(tmp_path / "log 1")
    config, log = start(**options), tmp_path / "log 2"

    def twice() -> None:  # as batch systems do
        for rank in ranks:
            in_process(rank, number)
            in_process(rank, number)

    with monkeypatch.context() as patch:
        at_step(5, patch, twice)
        codes = together(config, log)
    assert codes == [128 + number] * 2, printed(log)
    said = [output.count("--resume auto continues the run") for output in printed(log)]
    assert said == [1, 0]
    assert [path.name for path in RunFolder(config.folder).steps] == ["step-00000004", "step-00000006"]
    log = tmp_path / "log 3"
    assert together(start(resume="auto", **options), log) == [0, 0], printed(log)
    assert_same_run(RunFolder(config.folder), RunFolder(undisturbed.folder))


def stopped_at(step: int, config: TrainConfig, count: int, log: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that some processes, or this one, were interrupted in."""
    with monkeypatch.context() as patch:
        at_step(step, patch, lambda: in_process(0, signal.SIGTERM))
        codes = together(config, log, count)
    assert codes == [143] * count, printed(log)
    return RunFolder(config.folder)


def assert_alike(ours: RunFolder, theirs: RunFolder) -> None:
    """Weights, averages and the optimiser's state, to what single precision sums up to in a few steps."""
    left, right = (read_checkpoint(folder.steps[-1]) for folder in (ours, theirs))
    assert left["step"] == right["step"] == 8
    for key in ("averaged", "model"):
        for name, value in left[key].items():
            assert (value.float() - right[key][name].float()).abs().max() < 2e-3, name
    moments = right["optimizer"]["state"]
    for index, state in left["optimizer"]["state"].items():
        assert (state["exp_avg"] - moments[index]["exp_avg"]).abs().max() < 1e-2
    expected, found = (folder["rows"] for folder in (left, right))
    for row, same in zip(expected, found, strict=True):
        for name in ("train/loss", "train/top1", "val/loss"):
            assert row[name] == pytest.approx(same[name], abs=0.02), name


@pytest.mark.slow
@pytest.mark.faults("another number of processes than before")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("step", [3, 4])
def test_a_checkpoint_is_any_number_of_processes(
    before: int, after: int, strategy: str, step: int, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within an epoch, and at its end: the images that follow are those that would have followed."""
    options = {**CHANCELESS, "lr": 1e-4}
    alone: dict[str, Any] = {**options, "batch_size": 6}
    several: dict[str, Any] = {**options, "batch_size": 3, "strategy": strategy}
    theirs = train(start("theirs", **alone))
    kinds = {1: alone, 2: several}
    folder = stopped_at(step, start(**kinds[before]), before, tmp_path / "log 1", monkeypatch)
    log = tmp_path / "log 2"
    assert together(start(resume="auto", **kinds[after]), log, after) == [0] * after, printed(log)
    assert f"changed since then: batch_size {kinds[before]['batch_size']} -> " in printed(log)[0]
    assert f"devices {before} -> {after}" in printed(log)[0]
    assert_alike(folder, theirs)


@pytest.mark.slow
@pytest.mark.faults("another number of processes than before")
def test_other_images_in_a_step_are_refused(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, log = start(**PROCESSES), tmp_path / "log"
    assert together(config, log) == [0, 0], printed(log)
    assert command(start("other", batch_size=3, resume=str(RunFolder(config.folder).steps[0]))) == 2
    assert "devices 2 -> 1" in (err := capsys.readouterr().err)
    assert "batch_size times devices has to stay 6" in err


@pytest.mark.slow
@pytest.mark.faults("numbers that are not finite in one of several processes")
def test_the_process_whose_images_they_are_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, log = start(**PROCESSES), tmp_path / "log"
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        if self.state.step == 2 and own_rank() == 1:
            batch[0][1] = float("nan")
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "batch_loss", batch_loss)
        assert together(config, log) == [2, 2], printed(log)
    first, second = printed(log)
    assert "pcenet: error: step 3, process 1, epoch 1, batch 3: the input is not finite" in first
    assert "pcenet: error" not in second
    assert RunFolder(config.folder).steps[-1].name == "step-00000002"


@pytest.mark.slow
@pytest.mark.faults("an error of one of several processes")
def test_an_error_before_training_is_said_once(start: Start, whole: RunFolder, tmp_path: Path) -> None:
    """A folder that the first finds taken, and a network that nobody can make."""
    log = tmp_path / "log 1"
    assert together(start(**PROCESSES, out=str(whole.path)), log) == [2, 2]
    first, second = printed(log)
    assert first.count("exists and is never overwritten") == 1
    assert second == ""
    log = tmp_path / "log 2"
    assert together(start(**PROCESSES, model_args={"num_experts": 0}), log) == [2, 2]
    first, second = printed(log)
    assert first.count("pcenet: error: model_args") == 1
    assert second == ""


@pytest.mark.slow
@pytest.mark.faults("an error of one of several processes")
def test_a_disk_that_is_full_ends_all(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, log = start(**PROCESSES), tmp_path / "log"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr("pcenet.training.checkpoints.seal", full)
        assert together(config, log) == [2, 2], printed(log)
    assert "somewhere: No space left on device" in printed(log)[0]


@pytest.mark.faults("an error of one of several processes")
def test_who_had_no_error_ends_with_those_who_had(tmp_path: Path) -> None:
    """Without waiting for an exchange that the others will never come to."""

    def work() -> str:
        with in_a_group(ranks_of_environment(), torch.device("cpu"), minutes=0.5):
            try:
                with agreeing():
                    if own_rank() == 1:
                        raise ValueError("of one process alone")
            except ValueError as error:
                return f"{type(error).__name__}: {error}"
        return "no error"

    assert in_processes(work, tmp_path) == [1, 1]
    first, second = printed(tmp_path)
    assert first == "OtherProcessError: another process has failed\n"
    assert second == "ValueError: of one process alone\n"
