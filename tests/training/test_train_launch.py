"""Starting processes and watching over them; what they run needs neither torch nor Lightning."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.runs import alive, have_ended

from pcenet.cli import main
from pcenet.runtime.launcher import GRACE, LIFELINE, LOST, Launcher, Ranks, free_port, ranks_of_environment

RANK = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
FOR_EVER = "time.sleep(600)"


def launched(script: str, count: int = 2, grace: float = GRACE) -> int:
    return Launcher([sys.executable, "-S", "-c", RANK + script], count, grace).run()


def test_each_finds_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    script = "sys.stdout.write(' '.join(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')) + '\\n')"
    assert launched(script, 3) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 3", "1 1 3", "2 2 3"]


def test_a_place_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert ranks_of_environment() == Ranks()  # some clusters set these for every program
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert ranks_of_environment() == Ranks(5, 8, 1, 4)
    assert str(Ranks(5, 8)) == "process 5 of 8"


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)", 137, "process 1 of 2 was ended by SIGKILL"),
        ("sys.exit(1) if rank == 1 else time.sleep(600)", 1, "process 1 of 2 failed"),
        ("sys.exit(2) if rank == 1 else time.sleep(600)", 2, None),  # it has said so itself
        (f"sys.exit({LOST}) if rank == 1 else time.sleep(600)", 137, "process 0 of 2 did not answer"),
    ],
)
def test_the_one_that_fails_is_named_and_the_others_are_ended(
    script: str, code: int, line: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(script, grace=0.1) == code
    err = capfd.readouterr().err
    assert err.startswith(f"pcenet: error: {line}") if line else err == ""


def test_the_cause_is_named_though_others_notice_first(capsys: pytest.CaptureFixture[str]) -> None:
    ended = Launcher([], 3, codes={2: LOST, 1: -signal.SIGSEGV, 0: LOST})
    assert ended.report() == 128 + signal.SIGSEGV
    assert "process 1 of 3 was ended by SIGSEGV" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_all_of_them(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A launcher of its own, which is signalled when both have said that they are ready."""
    handle = f"signal.signal({int(number)}, lambda *_: sys.exit({code}))\n"
    script = RANK + handle + "os.write(1, b'x')\n" + FOR_EVER
    start = (
        "import signal, sys; from pcenet.runtime.launcher import Launcher;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.exit(Launcher([sys.executable, '-S', '-c', {script!r}], 2).run())"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.read(2) == b"xx"
        launcher.send_signal(number)
        assert launcher.wait(60) == code


def test_they_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    script = RANK + (
        "from pcenet.runtime.launcher import end_with_the_launcher; end_with_the_launcher()\n"
        "os.write(1, f'{os.getpid()}\\n'.encode())\n" + FOR_EVER
    )
    run = f"Launcher([sys.executable, '-c', {script!r}], 2).run()"
    start = f"import sys; from pcenet.runtime.launcher import Launcher; {run}"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        processes = [int(launcher.stdout.readline()) for _ in range(2)]
        assert all(map(alive, processes))
        launcher.kill()
        assert have_ended(processes)


def test_a_port_is_free() -> None:
    assert 1024 <= free_port() < 65536


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "devices must be at least 1, got 0"),
        (["--devices", "2", "--find", "lr"], "find 'lr' tries one process alone, got devices 2: leave that out"),
        (["--strategy", "fsd"], "strategy 'fsd' is not one of auto, ddp, fsdp; did you mean 'fsdp'?"),
        (
            ["--strategy", "fsdp", "--device", "cpu"],
            "strategy 'fsdp' divides a network between processes: give --devices",
        ),
    ],
)
def test_wrong_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_process_is_started_for_one_of_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun the number of processes may be given, and has then to be right."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv(LIFELINE, raising=False)
    assert main(["train", "--devices", "2", "--device", "cpu"]) == 2
    assert "devices 2, but there are 4 processes" in capsys.readouterr().err
