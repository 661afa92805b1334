"""Fails where a layer has become slow: ``make test-speed``, which must run alone.

    python benchmarks/guard.py             # measure, and compare with what is recorded for this kind of processor
    python benchmarks/guard.py --record    # measure, and record it in benchmarks/results/guard.json

A figure is the ratio of a layer's time to the dense block's, as in `pcenet bench`, on two threads. A case is behind
when its ratio is more than one and a half times the recorded one; what is behind is measured again before it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from pcenet.benchmark.config import Shape
from pcenet.benchmark.machine import describe, machine
from pcenet.benchmark.subjects import DenseLayer, balance, forward_call, layer_step_call, make_batches, make_layer
from pcenet.benchmark.timing import Call, compare, interleaved, keep_freed_memory

RECORDED = Path(__file__).parent / "results" / "guard.json"
THREADS = 2
ROUNDS = 11
TOO_SLOW = 1.5


class Case(NamedTuple):
    """A layer in one of its two ways of running."""

    shape: Shape
    experts: int
    border: str
    training: bool

    def __str__(self) -> str:
        way = "forward and backward" if self.training else "forward"
        return f"{self.shape}, {self.experts} experts, {self.border}, {way}"


LAYERS = (
    (Shape(32, 64, 32, 8), 4, "halo"),
    (Shape(32, 128, 16, 4), 16, "exchange"),
    (Shape(64, 96, 8, 2), 4, "halo"),
    (Shape(64, 96, 8, 1), 4, "zero"),
    (Shape(1, 64, 32, 8), 4, "halo"),
)
CASES = tuple(Case(*layer, training) for layer in LAYERS for training in (False, True))


def ratio(case: Case) -> float:
    """A layer's time relative to the dense block's."""
    shape = case.shape
    size = (shape.side, shape.side)
    batches = make_batches(shape.batch, shape.channels, size, torch.device("cpu"), needs_grad=True)
    layer = make_layer(shape, case.experts, case.border)
    balance(layer, batches)
    dense = DenseLayer(shape.channels).to(memory_format=torch.channels_last)
    make: Callable[..., Call] = layer_step_call if case.training else forward_call
    calls = {"layer": make(layer, batches, "fp32"), "dense": make(dense, batches, "fp32")}
    seconds = interleaved(calls, rounds=5 * ROUNDS if shape.batch == 1 else ROUNDS)
    return compare(seconds["layer"], seconds["dense"])["ratio"]


def behind(cases: Iterable[Case], recorded: Mapping[str, float]) -> dict[str, float]:
    """The ratios of the cases that are too slow, twice in a row; every measurement is printed."""
    found: dict[str, float] = {}
    for case in cases:
        name = str(case)
        if name not in recorded:
            print(f"NOT CHECKED, no ratio is recorded: {name}")
            continue
        limit = TOO_SLOW * recorded[name]
        ratios = [ratio(case)]
        if ratios[0] > limit:
            ratios.append(ratio(case))
        print(f"{name}: {', then '.join(f'{value:.2f}' for value in ratios)}; recorded {recorded[name]:.2f}")
        if min(ratios) > limit:
            found[name] = min(ratios)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare or record; 1 where a case is behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    keep_freed_memory()
    about = machine(torch.device("cpu"))
    print(describe(about))
    kind = f"{about['kind']}, backend {about['backend']}"
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    if options.record:
        recorded[kind] = {"machine": about, "ratios": {str(case): round(ratio(case), 3) for case in CASES}}
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"recorded {len(CASES)} ratios for {kind} in {RECORDED.name}")
        return 0
    if kind not in recorded:
        print(f"NOTHING WAS CHECKED: no speed is recorded for {kind}; python benchmarks/guard.py --record records it")
        return 0
    slow = behind(CASES, recorded[kind]["ratios"])
    for name, value in slow.items():
        print(f"TOO SLOW: {name}: {value:.2f} times the dense block's time", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
