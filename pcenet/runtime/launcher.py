"""Starting the processes that train one network together, and watching over them. Imports neither torch nor Lightning.

``pcenet train --devices N`` starts N processes of the same command and waits for them; under torchrun that has been
done, on as many machines as there are. Each process finds its place in the environment.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pcenet.texts import say

LIFELINE = "PCENET_LIFELINE"  # in a process that we have started: the pipe that is closed when we are gone
TORCHRUN = "TORCHELASTIC_RUN_ID"
LOST = 3  # exit code of a process that can reach another one no longer
GRACE = 30.0  # seconds that the others have to end by themselves when one has failed


class OtherProcessError(ValueError):
    """Another process has an error and says so; this one ends in silence."""


class LostProcessError(RuntimeError):
    """Another process cannot be reached any longer."""


@dataclass(frozen=True)
class Ranks:
    """A process's place among those that train together.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local: its number on its machine, from 0.
        local_count: how many there are on its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count}"


def ranks_of_environment() -> Ranks:
    """The place of this process, as we or torchrun have put it into the environment; alone where neither has."""
    if LIFELINE not in os.environ and TORCHRUN not in os.environ:
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def end_with_the_launcher() -> None:
    """In a process that we have started: be killed when the one that watches is gone, however that ended."""
    if LIFELINE in os.environ:
        threading.Thread(target=_wait_for_the_end, args=(int(os.environ[LIFELINE]),), daemon=True).start()


def _wait_for_the_end(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def launch(arguments: Sequence[str], count: int) -> int:
    """Run a command of this program in several processes on this machine; returns its exit code.

    Args:
        arguments: the command and its options.
        count: how many processes.
    """
    return Launcher([sys.executable, "-P", "-m", "pcenet", *arguments], count).run()


@dataclass
class Launcher:
    """Processes of one command, from their start to their end.

    Signals are passed on to each of them. When one has failed the others get some time and are then killed, and so they
    are when this process is gone.

    Args:
        command: what each of them runs.
        count: how many.
        grace: seconds that the others have when one has failed.
    """

    command: Sequence[str]
    count: int
    grace: float = GRACE
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # in the order in which they ended
    killed: list[int] = field(default_factory=list)
    received: int = 0

    def run(self) -> int:
        """Start them, wait until all have ended, and say which one has failed; returns the exit code."""
        read, write = os.pipe()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self.pass_on)
        try:
            self.start(read)
            self.wait()
        finally:
            self.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)
        return self.report()

    def start(self, lifeline: int) -> None:
        """Start them, each in a session of its own: what a terminal sends reaches them by us alone."""
        threads = max(1, (os.cpu_count() or 1) // self.count)
        shared = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            LIFELINE: str(lifeline),
        }
        for rank in map(str, range(self.count)):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            process = subprocess.Popen(self.command, env=own, pass_fds=[lifeline], start_new_session=True)
            self.processes.append(process)
            if self.received:  # while it was being started
                process.send_signal(self.received)

    def pass_on(self, number: int, _frame: object) -> None:
        """The handler of signals."""
        self.received = number
        for process in self.processes:
            process.send_signal(number)  # does nothing where it has ended

    def wait(self) -> None:
        """Until all have ended, or the time is over since the first failed."""
        ended: queue.Queue[tuple[int, int]] = queue.Queue()

        def wait_for(rank: int, process: subprocess.Popen[bytes]) -> None:
            ended.put((rank, process.wait()))

        for rank, process in enumerate(self.processes):
            threading.Thread(target=wait_for, args=(rank, process), daemon=True).start()
        deadline: float | None = None
        while len(self.codes) < self.count:
            try:
                rank, code = ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            self.codes[rank] = code
            if code and deadline is None:
                deadline = time.monotonic() + self.grace

    def kill(self) -> None:
        """Kill those that are left."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.killed.append(rank)
                process.kill()
        for process in self.processes:
            process.wait()

    def report(self) -> int:
        """Name the process that has failed, unless it has said so itself; returns the exit code of all."""
        failed = {rank: code for rank, code in self.codes.items() if code not in (0, LOST)}
        if not failed:
            if not self.killed:
                return LOST if LOST in self.codes.values() else 0
            names = ", ".join(map(str, self.killed))
            self.complain(f"process {names} of {self.count} did not answer and was killed")
            return 128 + signal.SIGKILL
        if 128 + self.received in failed.values():
            return 128 + self.received
        rank, code = next(iter(failed.items()))
        if code < 0:
            hint = ", for lack of memory perhaps" if -code == signal.SIGKILL else ""
            self.complain(f"process {rank} of {self.count} was ended by {signal.Signals(-code).name}{hint}")
            return 128 - code
        if code == 1:
            self.complain(f"process {rank} of {self.count} failed")
        return code

    def complain(self, what: str) -> None:
        """Print one line."""
        say(f"pcenet: error: {what}; the others were ended; --resume auto continues the run", to=sys.stderr)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
