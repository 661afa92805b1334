"""What processes that train one network together share: sums and rows over all of them.

Each of W processes has a batch of its own, all of one size. The mean of their losses is what is minimised, as
`torch.nn.parallel.DistributedDataParallel` does by averaging gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """W; 1 where no process group was made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all processes, differentiable: what one process does with it counts for
    all. Every process must ask for it, and for its gradient, in the same order. The tensor itself for one process."""
    return x if process_count() == 1 else _Sum.apply(x)


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """``[n, ...]`` of each process, one after the other: ``[W * n, ...]``, without gradient."""
    if process_count() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(process_count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    """All-reduce; as every process uses the sum, its gradient is the sum of theirs. (torch.distributed.nn has it, but
    deprecated in favour of a module that is private.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduce(grad)


def _all_reduce(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
