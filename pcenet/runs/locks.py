"""Locks between processes. The kernel keeps them, so that a process that has died holds none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()


@contextmanager
def locked(path: Path, *, flags: int = os.O_RDWR | os.O_CREAT, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file or folder.

    Args:
        path: what is locked; by default a file that is made where there is none.
        flags: how it is opened; ``os.O_RDONLY`` for a folder.
        wait: until nobody else holds the lock.

    Yields:
        Whether we hold it: without ``wait`` another process may.
    """
    descriptor = os.open(path, flags, 0o644)
    _held.add(descriptor)
    try:
        yield acquire(descriptor, wait)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def acquire(descriptor: int, wait: bool) -> bool:
    """Take the lock of an open file, or say that another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, which need not exist."""
    if not path.is_file():
        return False
    with locked(path, flags=os.O_RDWR) as free:
        return not free


def _let_go() -> None:
    """Processes that load images are copies of ours; with our descriptors open they would hold our locks after us."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
