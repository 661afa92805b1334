"""SIGTERM and Ctrl-C: the step is finished and kept; asked twice, the run ends at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults.runs import Start, alive, assert_same_run, at_step, in_a_process, pcenet

import pcenet.training.checkpoints as checkpoints
from pcenet.data import build_loader, eval_transform, open_source
from pcenet.runs.folder import RunFolder
from pcenet.training.loop import Trainer
from pcenet.training.run import train

STOPPED = {signal.SIGTERM: (143, "stopped by SIGTERM"), signal.SIGINT: (130, "interrupted")}


@pytest.mark.faults("SIGTERM, Ctrl-C")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    options = {"checkpoint_minutes": None}  # no other checkpoint is there to help
    config, log = start(**options), tmp_path / "log"
    with monkeypatch.context() as patch:
        at_step(5, patch, lambda: os.kill(os.getpid(), number))
        code = pcenet(config, log)
    assert code == STOPPED[number][0], log.read_text()
    lines = log.read_text().splitlines()
    assert lines[-1] == f"pcenet: error: {STOPPED[number][1]}; --resume auto continues the run"
    assert "stopping after this step" in log.read_text()
    assert "Traceback" not in log.read_text()
    folder = RunFolder(config.folder)
    assert [path.name for path in folder.steps] == ["step-00000004", "step-00000006"]
    assert_same_run(train(start(resume="auto", **options)), whole)


@pytest.mark.slow
@pytest.mark.faults("SIGTERM, Ctrl-C")
@pytest.mark.parametrize("number", STOPPED)
def test_a_signal_between_two_steps_ends_the_run_after_the_next(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    options = {"checkpoint_minutes": None}
    config = start(**options)

    step = Trainer.optimizer_step

    def early(self: Trainer, *arguments: Any) -> int:
        if self.state.step == 6:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", early)
        assert pcenet(config, tmp_path / "log") == STOPPED[number][0], (tmp_path / "log").read_text()
    assert RunFolder(config.folder).steps[-1].name == "step-00000007"
    assert_same_run(train(start(resume="auto", **options)), whole)


@pytest.mark.slow
@pytest.mark.faults("a signal to the whole process group")
@pytest.mark.parametrize("number", STOPPED)
def test_processes_that_load_images_outlive_the_signal_and_not_the_run(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    options = {"checkpoint_minutes": None, "workers": 2}
    config, log, noted = start(**options), tmp_path / "log", tmp_path / "workers"

    def signal_all() -> None:
        noted.write_text(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
        child = os.fork()  # somebody else than the run itself, which may end its processes
        if child == 0:
            os.killpg(0, number)
            os._exit(0)
        os.waitpid(child, 0)

    with monkeypatch.context() as patch:
        at_step(5, patch, signal_all)
        assert pcenet(config, log) == STOPPED[number][0], log.read_text()
    assert RunFolder(config.folder).steps[-1].name == "step-00000006"
    workers = noted.read_text().split()
    assert len(workers) >= 2
    assert not any(alive(int(worker)) for worker in workers)
    assert_same_run(train(start(resume="auto", **options)), whole)


KEPT: list[object] = []


@pytest.mark.faults("a signal to the whole process group")
def test_processes_that_load_images_end_with_the_program(pictures: Path, tmp_path: Path) -> None:
    """Python ends them with SIGTERM, and waits for them, where somebody still holds the iterator at exit."""

    def leave_it_open() -> None:
        source = open_source(pictures, "train")
        loader = build_loader(source, eval_transform(32), batch_size=4, train=True, workers=1)
        batches = iter(loader)
        next(batches)  # by now the process is at work
        KEPT.append(batches)

    assert in_a_process(leave_it_open, tmp_path / "log") == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.faults("a signal during validation")
def test_a_signal_during_validation_takes_effect_after_it(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"checkpoint_minutes": None}
    config = start(**options)
    with monkeypatch.context() as patch:
        original = Trainer.end_epoch

        def late(self: Trainer, *arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            original(self, *arguments)

        patch.setattr(Trainer, "end_epoch", late)
        assert pcenet(config, tmp_path / "log") == 143, (tmp_path / "log").read_text()
    assert [path.name for path in RunFolder(config.folder).steps] == ["step-00000004"]
    assert_same_run(train(start(resume="auto", **options)), whole)


@pytest.mark.faults("Ctrl-C twice")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_the_second_signal_ends_the_run_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = start(checkpoint_minutes=None)

    def twice() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        (tmp_path / "after").touch()

    with monkeypatch.context() as patch:
        at_step(1, patch, twice)
        assert pcenet(config, tmp_path / "log") == code, (tmp_path / "log").read_text()
    assert not (tmp_path / "after").exists()
    assert RunFolder(config.folder).steps == []


@pytest.mark.slow
@pytest.mark.faults("Ctrl-C twice")
def test_the_second_signal_may_come_while_a_checkpoint_is_written(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = start()
    folder = RunFolder(config.folder)
    original = checkpoints.seal

    def seal(path: Path) -> None:
        if path.name.startswith("step-00000003"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", seal)
        assert pcenet(config, tmp_path / "log") == 130, (tmp_path / "log").read_text()
    assert [path.name for path in folder.steps] == ["step-00000001", "step-00000002"]
    assert not list(folder.checkpoints.glob("*.tmp")), "what is given up is removed"
    assert_same_run(train(start(resume="auto")), whole)


@pytest.mark.faults("SIGTERM, Ctrl-C")
def test_before_training_a_signal_ends_the_run_at_once_and_leaves_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = start()
    monkeypatch.setattr("pcenet.training.run.announce", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert pcenet(config, tmp_path / "log") == 143, (tmp_path / "log").read_text()
    assert not config.folder.exists()
