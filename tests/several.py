"""Several processes that train together, forked from this one: what they would have to import is there already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from faults.runs import have_ended

from pcenet.runtime.launcher import LIFELINE, free_port


def in_processes(work: Callable[[], object], folder: Path, count: int = 2) -> list[int]:
    """Do something in processes that see each other; their exit codes, or minus the signals.

    What process r prints goes to the file ``r`` in a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    lifeline, ours = os.pipe()

    def begin(rank: int) -> None:
        os.close(ours)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LIFELINE: str(lifeline)}
        counts = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ.update(shared | counts | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        descriptor = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.exit(work())

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(count)]
    with ExitStack() as stack:
        stack.callback(os.close, lifeline)
        stack.callback(os.close, ours)
        for process in processes:
            process.start()
            stack.callback(process.kill)
        identities = [process.pid for process in processes if process.pid is not None]
        assert have_ended(identities), "it hangs\n" + "\n".join(map(str.strip, printed(folder)))
        for process in processes:
            process.join()
        return [process.exitcode if process.exitcode is not None else 0 for process in processes]


def printed(folder: Path) -> list[str]:
    """What each of them has printed."""
    return [path.read_text() for path in sorted(folder.iterdir())]
