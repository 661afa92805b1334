"""Telling that memory ran out: Python, NumPy, torch and the system each say it in a way of their own."""

from __future__ import annotations

import errno

# Of RuntimeErrors, which torch and its libraries raise on processors and GPUs.
PHRASES = (
    *("can't allocate memory", "out of memory", "bad_alloc", "bad allocation", "ALLOC_FAILED"),
    "could not create a primitive",  # oneDNN's, for which no option is to blame either way
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, the computer's or a GPU's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def reason_of(error: Exception) -> str:
    """An error in one line, for whoever goes on without what has failed."""
    if ran_out_of_memory(error):
        return "memory ran out"
    if isinstance(error, ModuleNotFoundError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
