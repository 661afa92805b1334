"""Locks between processes, by filelock: the system keeps them, so that a process that has died holds none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which is made where there is none; yields whether we do, or another process does."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, which need not exist."""
    if not path.is_file():
        return False
    with locked(path) as free:
        return not free
