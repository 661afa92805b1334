"""SIGTERM and Ctrl-C: training ends after the step at work, with a checkpoint; asked twice, it ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"pcenet: stopping after this step, or after validation, with a checkpoint; ask again to stop at once\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work; as `KeyboardInterrupt` it passes whoever catches errors."""


class Stop:
    """Whether a signal has asked for the end, and what to do about it.

    Args:
        same: seconds in which a further signal is taken for the first once more: of several processes, one may be sent
            it by the batch system and by the process that has started it.
        quiet: do not print a notice.

    Attributes:
        patient: the first signal waits until somebody looks at `signal`; otherwise each raises where it arrives.
        signal: the number of the last signal; 0 where none has come.
    """

    def __init__(self, same: float = 0.0, quiet: bool = False) -> None:
        self.patient = False
        self.signal = 0
        self._same = same
        self._quiet = quiet
        self._first = 0.0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of both signals."""
        if self.signal and time.monotonic() - self._first < self._same:
            return
        wait = self.patient and not self.signal
        self._first = self._first if self.signal else time.monotonic()
        self.signal = number
        if not wait:
            end_by(number)
        if not self._quiet:
            os.write(2, NOTICE)  # print may be what the signal has interrupted

    def listen(self) -> None:
        """Handle both signals from now on; one that the caller has the system ignore stays ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self.handle)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The first signal waits until somebody looks at `signal`."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


def end_by(number: int) -> None:
    """Raise `Terminated` for SIGTERM, `KeyboardInterrupt` for Ctrl-C; nothing for 0."""
    if number:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def listening(same: float = 0.0, quiet: bool = False) -> Iterator[Stop]:
    """A `Stop` that handles both signals; afterwards their handlers are those of before. Arguments as there."""
    stop = Stop(same, quiet)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
