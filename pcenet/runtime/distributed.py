"""What processes that train together have to agree on: decisions, errors, sums, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcenet.nn import RoutingStatistics
from pcenet.nn.processes import process_count, sum_over_processes
from pcenet.runtime.launcher import LostProcessError, OtherProcessError, Ranks

T = TypeVar("T")


def own_rank() -> int:
    """The number of this process; 0 where no process group was made."""
    return dist.get_rank() if process_count() > 1 else 0


@contextmanager
def together(ranks: Ranks, device: torch.device, minutes: float) -> Iterator[None]:
    """A process group, over gloo on processors and NCCL on GPUs; none for a process alone, or within another one.

    Args:
        ranks: this process's place.
        device: on what it computes.
        minutes: how long to wait for the others.

    Raises:
        LostProcessError: if another process ends, or keeps silent for so long.
    """
    if ranks.count == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(ranks.local)
    with naming_lost_processes():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=timedelta(minutes=minutes),
        )
        yield
        dist.destroy_process_group()  # not after an error: that might wait for what will never come


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the errors of an exchange that broke off into `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text and "Connection closed by peer" not in text:
            raise
        raise LostProcessError(f"another process cannot be reached any longer ({text.splitlines()[0]})") from error


def decide(act: Callable[[], T]) -> T:
    """What the first process finds, in all of them; its errors end all.

    Raises:
        OtherProcessError: in the others, where it failed.
    """
    if process_count() == 1:
        return act()
    if own_rank():
        message: list[Any] = [None]
        dist.broadcast_object_list(message)
        if message[0] is None:
            raise OtherProcessError("process 0 has failed")
        found: T = message[0][0]
        return found
    message = [None]
    try:
        message = [(act(),)]
    finally:
        dist.broadcast_object_list(message)
    return message[0][0]


@contextmanager
def agreeing() -> Iterator[None]:
    """What all processes do in the same way, or not at all: the first that fails says so, and all end.

    Raises:
        OtherProcessError: where another process fails, and none before it.
    """
    if process_count() == 1:
        yield
        return
    try:
        yield
    except (ValueError, OSError) as error:
        if first_of_them(True) != own_rank():
            raise OtherProcessError("another process has failed") from error
        raise
    if first_of_them(False) is not None:
        raise OtherProcessError("another process has failed")


def first_of_them(holds: bool) -> int | None:
    """The first process for which something holds; None where it does for none."""
    count = process_count()
    rank = -largest([-own_rank() if holds else -count])[0]
    return None if rank == count else rank


def largest(numbers: list[int]) -> list[int]:
    """Of each number the largest over all processes."""
    if process_count() == 1:
        return numbers
    shared = torch.tensor(numbers, device=exchange_device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return list(map(int, shared.tolist()))


def exchange_device() -> torch.device:
    """Where what is exchanged has to lie."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather(value: T) -> list[T]:
    """A plain value of each process, in their order, in all of them; tensors in it have to be on the processor."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def share(tensors: list[Tensor]) -> None:
    """Give all processes the first one's values, in place; one exchange for each type."""
    if process_count() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike]).to(exchange_device())
        dist.broadcast(flat, 0)
        for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(values.view_as(tensor))


def share_statistics(module: nn.Module) -> None:
    """Running statistics are the first process's, as the checkpoint will have them."""
    share(list(module.buffers()))


def over_processes(statistics: RoutingStatistics) -> RoutingStatistics:
    """The counts of all processes, each of which has some."""
    if process_count() == 1:
        return statistics
    state = statistics.state_dict()
    total = RoutingStatistics()
    total.load_state_dict({name: sum_over_processes(count) for name, count in state.items() if count is not None})
    return total
