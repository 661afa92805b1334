"""SIGTERM and Ctrl-C: training ends after the step at work, with a checkpoint; asked twice, it ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"pcenet: stopping after this step, or after validation, with a checkpoint; ask again to stop at once\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work; as `KeyboardInterrupt` it passes whoever catches errors."""


class Stop:
    """Whether a signal has asked for the end, and what to do about it.

    Attributes:
        patient: the first signal waits for `if_requested`; otherwise every signal raises where it arrives.
    """

    def __init__(self) -> None:
        self.patient = False
        self._signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of both signals."""
        wait = self.patient and not self.requested
        self._signal = number
        if not wait:
            self.if_requested()
        os.write(2, NOTICE)  # print may be what the signal has interrupted

    def if_requested(self) -> None:
        """Raise `Terminated` after SIGTERM, `KeyboardInterrupt` after Ctrl-C."""
        if self.requested:
            raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt

    def listen(self) -> None:
        """Handle both signals from now on; one that the caller has the system ignore stays ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self.handle)


@contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that handles both signals; afterwards their handlers are those of before."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
