"""Where the time of a forward and backward pass goes, operator by operator, for a PCE layer and the dense block.

    python benchmarks/profile_step.py 64x64x32x8 --experts 4 --border halo

On a CPU, where an operator's call takes as long as its work. Each operator is called through Python here, which makes
the whole a little slower, and many small ones more than a little. The router's part is that of its own forward and
backward pass, run alone.
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
from pcenet.benchmark.machine import describe, machine
from pcenet.benchmark.subjects import DenseLayer, balance, layer_step_call, make_batches, make_layer
from pcenet.benchmark.timing import Call, keep_freed_memory

ROUNDS = 10
LARGE = 100_000  # numbers in the largest tensor that goes in or comes out: what is smaller is bookkeeping
OWN = "pcenet::"  # the package's own operators, which get a row each however small
SMALL_SHARE = 0.01  # of a pass: rows below it in every column are put together


class OperatorTimes(TorchDispatchMode):
    """Seconds by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        passed = time.perf_counter() - start
        name = str(func.overloadpacket).replace(".", "::")
        self.seconds[name if name.startswith(OWN) or is_large((args, result)) else "bookkeeping"] += passed
        return result


def is_large(value: Any) -> bool:
    """Whether a tensor of many numbers is in it."""
    if isinstance(value, Tensor):
        return value.numel() >= LARGE
    return isinstance(value, list | tuple) and any(map(is_large, value))


def profile(call: Call) -> dict[str, float]:
    """Milliseconds by operator, a mean over rounds."""
    for index in range(ROUNDS):
        call(index)
    with OperatorTimes() as times:
        for index in range(ROUNDS):
            call(index)
    return {name: 1e3 * seconds / ROUNDS for name, seconds in times.seconds.items()}


def together(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The columns with all operators that take little in each of them in one row, ``"other"``."""
    totals = {title: sum(column.values()) for title, column in columns.items()}
    kept = {
        name
        for title, column in columns.items()
        for name, value in column.items()
        if name.startswith(OWN) or value >= SMALL_SHARE * totals[title]
    }
    return {
        title: {name: value for name, value in column.items() if name in kept}
        | {"other": sum(value for name, value in column.items() if name not in kept)}
        for title, column in columns.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=parse_shape, help="BATCHxCHANNELSxSIDExPATCH")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--border", choices=BORDERS, default="halo")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    shape = options.shape
    size = (shape.side, shape.side)
    batches = make_batches(shape.batch, shape.channels, size, torch.device("cpu"), needs_grad=True)
    layer = make_layer(shape, options.experts, options.border)
    balance(layer, batches)

    def route(index: int) -> None:
        layer.train()
        layer.router(batches[index % len(batches)]).gates.sum().backward()

    dense = DenseLayer(shape.channels).to(memory_format=torch.channels_last)
    calls: dict[str, Call] = {
        "dense": layer_step_call(dense, batches, options.precision),
        "PCE": layer_step_call(layer, batches, options.precision),
        "of which router": route,
    }
    columns = together({name: profile(call) for name, call in calls.items()})
    print(describe(machine(torch.device("cpu"))))
    table = Table("ms", *columns, title=f"{shape}, {options.experts} experts, {options.border}, {options.precision}")
    names = {name for column in columns.values() for name in column}
    for name in sorted(names, key=lambda name: -max(column.get(name, 0.0) for column in columns.values())):
        table.add_row(name, *(f"{column.get(name, 0.0):.1f}" for column in columns.values()))
    table.add_row("all", *(f"{sum(column.values()):.1f}" for column in columns.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
