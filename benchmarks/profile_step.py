"""Where the time of a forward and backward pass goes, operator by operator, for a PCE layer and the dense block.

    python benchmarks/profile_step.py 64x64x32x8 --experts 4 --border halo

On a CPU, where an operator's call takes as long as its work. Calling Python for every operator makes the whole a little
slower than it is. The router's part is that of its own forward and backward pass, run alone.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcenet.benchmark.config import BORDERS, parse_shape
from pcenet.benchmark.subjects import DenseLayer, balance, layer_step_call, make_batches, make_layer
from pcenet.benchmark.timing import Call, keep_freed_memory

ROUNDS = 10
KINDS = {
    "convolution": "convolutions",
    "convolution_backward": "convolutions",
    "bmm": "convolutions",  # as matrix products
    "native_batch_norm": "normalisation",
    "native_batch_norm_backward": "normalisation",
    "gelu": "GELU",
    "gelu_backward": "GELU",
    "index_select": "gathering",
    "index_copy_": "scattering",
    "index_add_": "scattering",
    "cat": "copies and zeros",
    "copy_": "copies and zeros",
    "clone": "copies and zeros",
    "new_zeros": "copies and zeros",
    "zeros_like": "copies and zeros",
    "add": "sums of maps",
    "mul": "gate",
    "sum": "gate",
}
LARGE = 100_000  # numbers: what is smaller is bookkeeping


class OperatorTimes(TorchDispatchMode):
    """Seconds by kind of operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        large = any(isinstance(arg, Tensor) and arg.numel() >= LARGE for arg in args) or name == "cat"
        self.seconds[KINDS.get(name, "other") if large else "bookkeeping"] += time.perf_counter() - start
        return result


def profile(call: Call) -> dict[str, float]:
    """Milliseconds by kind of operator, a mean over rounds."""
    for index in range(ROUNDS):
        call(index)
    with OperatorTimes() as times:
        for index in range(ROUNDS):
            call(index)
    return {kind: 1e3 * seconds / ROUNDS for kind, seconds in times.seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=parse_shape, help="BATCHxCHANNELSxSIDExPATCH")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--border", choices=BORDERS, default="halo")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    shape = options.shape
    size = (shape.side, shape.side)
    batches = make_batches(shape.batch, shape.channels, size, torch.device("cpu"), needs_grad=True)
    layer = make_layer(shape, options.experts, options.border, "sorted")
    balance(layer, batches)

    def route(index: int) -> None:
        layer.train()
        layer.router(batches[index % len(batches)]).choice_weight.sum().backward()

    calls: dict[str, Call] = {
        "dense": layer_step_call(DenseLayer(shape.channels).to(memory_format=torch.channels_last), batches, "fp32"),
        "PCE": layer_step_call(layer, batches, "fp32"),
        "of which router": route,
    }
    columns = {name: profile(call) for name, call in calls.items()}
    table = Table("ms", *columns, title=f"{shape}, {options.experts} experts, {options.border}")
    for kind in sorted({kind for column in columns.values() for kind in column}):
        table.add_row(kind, *(f"{column.get(kind, 0.0):.1f}" for column in columns.values()))
    table.add_row("all", *(f"{sum(column.values()):.1f}" for column in columns.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
