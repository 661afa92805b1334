"""Fair clocks: what is compared runs in turns, in one process."""

from __future__ import annotations

import ctypes
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Call = Callable[[int], Any]


def interleaved(calls: Mapping[str, Call], *, rounds: int, warm_up: int = 4) -> dict[str, list[float]]:
    """Seconds of each call in each round, the calls in turns and every other round backwards.

    Args:
        calls: by name, each called with the number of the round.
        rounds: those that count.
        warm_up: rounds before, not timed.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        for name in names if index % 2 else reversed(names):
            synchronise()
            start = time.perf_counter()
            calls[name](index)
            synchronise()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Inside, torch.compile finds nothing in memory or on the disk of what it compiled before, but is itself loaded."""
    import torch._inductor.config as inductor

    with inductor.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*force disabled by torch.compiler.config")
        torch.compiler.reset()
        torch.compile(torch.sin)(torch.ones(8))
        yield


def first_calls(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds of one call each, as `interleaved` gives them: of what is not compiled yet the time to compile it."""
    return interleaved(calls, rounds=1, warm_up=0)


def synchronise() -> None:
    """Wait for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median times in milliseconds and the ratio pair by pair: its median and quartiles."""
    ratios = [ours / theirs for ours, theirs in zip(seconds, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "base_ms": statistics.median(base) * 1e3,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory that tensors leave, as other allocators do.

    By default it returns large blocks to the system and asks for them again, and the page faults fall to one side or
    the other by chance: they moved single ratios by 30 %.

    Returns:
        Whether there is a glibc that took the advice.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # 32 MiB is the most that glibc accepts for the second.
    return bool(mallopt(mmap_threshold, 2**25) and mallopt(trim_threshold, 2**31 - 1))


def peak_memory(model: nn.Module, step: Callable[[], Any], *others: Any) -> int:
    """Bytes of all tensors at the peak of a call, by torch's own tracker; the model's parameters are among them.

    Args:
        model: the network.
        step: the call. It is made once before: an optimiser has its moments from the first step on.
        others: what else holds tensors all the time, such as the optimiser.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    step()
    tracker = MemTracker()
    tracker.track_external(model, *others)
    with tracker:
        step()
    return max(int(kinds["Total"]) for kinds in tracker.get_tracker_snapshot("peak").values())
