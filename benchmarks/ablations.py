"""What single decisions of the sorted dispatch bring: each is taken back, and the layer timed beside itself.

    python benchmarks/ablations.py --json benchmarks/results/ablations.json

Ratios above 1 say how much slower the layer would be without it. In every round the batch is another one, and with it
every expert's count of patches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pcenet.benchmark import subjects
from pcenet.benchmark.config import Shape
from pcenet.benchmark.run import describe, machine
from pcenet.benchmark.timing import Call, compare, interleaved, keep_freed_memory
from pcenet.nn import dispatch, kernels

BATCHES = 24  # more than rounds: routing never repeats


@contextmanager
def without(target: Any, name: str, value: Any) -> Iterator[None]:
    """A name of a module replaced."""
    with mock.patch.object(target, name, value):
        yield


CASES: list[tuple[str, Shape, int, Callable[[], Any]]] = [
    (
        "Winograd for patches of 4x4",
        Shape(64, 128, 16, 4),
        4,
        lambda: without(dispatch, "make_kernel", kernels.make_plain_kernel),
    ),
    (
        "Winograd for patches of 2x2",
        Shape(64, 256, 8, 2),
        4,
        lambda: without(dispatch, "make_kernel", kernels.make_plain_kernel),
    ),
    (
        "patches of 1x1 as a matrix product",
        Shape(64, 256, 8, 1),
        4,
        lambda: without(dispatch, "make_kernel", kernels.WindowKernel),
    ),
]


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    about = machine(torch.device("cpu"))
    print(describe(about))
    records = []
    for name, shape, experts, taken_back in CASES:
        size = (shape.side, shape.side)
        with mock.patch.object(subjects, "BATCHES", BATCHES):
            batches = subjects.make_batches(shape.batch, shape.channels, size, torch.device("cpu"), needs_grad=True)
        layer = subjects.make_layer(shape, experts, "halo", "sorted")
        subjects.balance(layer, batches)
        step = subjects.layer_step_call(layer, batches, "fp32")

        def step_without(index: int, step: Call = step, taken_back: Callable[[], Any] = taken_back) -> None:
            with taken_back():
                step(index)

        seconds = interleaved({"with": step, "without": step_without}, rounds=options.rounds, warm_up=3)
        record = {"what": name, "shape": str(shape), "experts": experts}
        record |= compare(seconds["without"], seconds["with"])
        records.append(record)
        print(f"{name}, {shape}, {experts} experts: without it {record['ratio']:.2f} times as long")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
