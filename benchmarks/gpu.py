"""Everything that is to be known of a GPU, in one go of less than eight minutes:

    python benchmarks/gpu.py --out benchmarks/results/gpu --data cifar10.zip

In this order: the Triton kernels against the reference in float64, with 4 and 8 warps, with TF32 and without; the tests
of tests/test_gpu.py; time and memory of layers and networks against their dense twins, eager and compiled; images a
second at 224 pixels; a CUDA graph at batch 1; a profile; then, as long as there is time, trainings on CIFAR-10. It
needs this repository, its environment and the archive, and no network. Each step is a process of its own, so that one
that fails takes no other with it; results are written as they come, and ``summary.json`` says what was done and what
not, and why. ``--rehearse`` does a little of everything on the processor, which shows that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pcenet
from pcenet import ops
from pcenet.benchmark.config import parse_shape
from pcenet.benchmark.machine import machine
from pcenet.benchmark.subjects import layer_step_call, make_batches, make_layer, model_step_call
from pcenet.ops import library

HERE = Path(__file__).resolve()
STOPPED = "stopped: its time was over"
LAYERS = "[64x64x32x8,64x128x16x4,64x256x8x2]"
NETWORKS = ("pce_tiny", "dense_tiny", "pce_small", "dense_small")


class Options(NamedTuple):
    """What the script was asked for, as each step is told it."""

    out: Path
    data: str
    rehearse: bool

    @property
    def device(self) -> torch.device:
        """Where is computed."""
        return torch.device("cpu" if self.rehearse else "cuda")


# ---- The kernels


class Case(NamedTuple):
    """A layer's operators: patch side S, channels C and D, experts E, whether taps reach beyond a patch, kernel K."""

    side: int
    channels: int
    outs: int
    experts: int
    neighbours: bool
    kernel: int = 3


CASES = [
    Case(8, 64, 64, 4, True),
    Case(8, 64, 64, 4, False),
    Case(4, 128, 128, 16, True),
    Case(2, 256, 96, 8, True),
    Case(1, 48, 40, 4, True),
    Case(4, 64, 32, 4, True, kernel=1),
    Case(7, 24, 70, 3, True),
    Case(16, 5, 16, 4, True),
]
# Of products in these types, what a sum may be off by, as a share of the largest; sums themselves are in float32.
ROUNDING = {"fp32": 2**-23, "tf32": 2**-10, "bf16": 2**-8, "fp16": 2**-10}
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def operators_of(case: Case, x: Tensor, weight: Tensor, expert: Tensor, table: Tensor) -> dict[str, Tensor]:
    """A convolution and a normalisation with all that follows it, their gradients, and both at evaluation, in one."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    base = 0.5 * weight[0].detach()
    scale, shift = (each.detach().to(dtype).requires_grad_() for each in table)
    running = torch.zeros_like(scale.detach()), torch.ones_like(scale.detach())
    gate = torch.linspace(0.5, 1, len(expert), device=x.device, dtype=dtype).requires_grad_()
    out = ops.patch_conv2d(x, weight, expert, case.side, case.neighbours, base=base)
    residual = out.detach().flip(0)
    more = {"gelu": True, "gate": gate, "residual": residual}
    normed = ops.expert_norm(out, scale, shift, expert, case.side, running, 1e-5, **more).out
    inputs = {"x": x, "weight": weight, "scale": scale, "shift": shift, "gate": gate}
    grads = torch.autograd.grad(normed, list(inputs.values()), torch.ones_like(normed) + out.detach())
    with torch.no_grad():
        then = ops.Affine(scale, shift, True, gate, residual)
        fused = ops.patch_conv2d(x, weight, expert, case.side, case.neighbours, base=base, then=then)
    outputs = {"convolution": out, "normalisation": normed, "evaluation": fused}
    return {name: each.detach() for name, each in {**outputs, **dict(zip(inputs, grads, strict=True))}.items()}


def kernels(options: Options) -> Iterator[dict[str, Any]]:
    """Outputs and gradients against the reference in float64, which no kernel computes.

    What takes the time is compiling, one case a process; 8 warps come last.
    """
    if options.rehearse:
        for case in CASES[6:]:
            yield from compared(case, ["fp32"], 4, options.device.type)
        return
    tasks = [(case, list(ROUNDING), warps, options.device.type) for warps in (4, 8) for case in CASES]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compared, *task) for task in tasks]):
            yield from done.result()


def compared(case: Case, types: list[str], warps: int, device: str) -> list[dict[str, Any]]:
    """A record for each type and each part of a case."""
    from pcenet.ops import gpu

    gpu.WARPS = warps
    torch.manual_seed(0)
    images, height, width = (1, 9, 11) if device == "cpu" else (4, 30, 33)
    patches = images * -(-height // case.side) * -(-width // case.side)
    x = torch.randn(images, case.channels, height, width).bfloat16().to(device)
    weight = torch.randn(case.experts, case.outs, case.channels, case.kernel, case.kernel)
    weight = (weight / (case.kernel**2 * case.channels) ** 0.5).bfloat16().to(device)
    expert = torch.randint(-1, case.experts, (patches,)).to(device)
    table = torch.randn(2, case.experts, case.outs).to(device)
    exact = operators_of(case, x.double(), weight.double(), expert, table)
    records = []
    for name in types:
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        found = operators_of(case, x.to(TYPES[name]), weight.to(TYPES[name]), expert, table)
        # Errors of many numbers add up like a random walk; a normalisation hands on those of all before it.
        allowed = 8 * ROUNDING[name] * max(1.0, (x.numel() / case.channels) ** 0.5 * (name == "fp32"))
        for part, right in exact.items():
            error = float((found[part].double() - right).abs().max() / right.abs().max())
            record = {"case": case._asdict(), "precision": name, "warps": warps, "part": part, "error": error}
            records.append(record | {"allowed": allowed, "ok": error <= allowed})
    return records


# ---- What is measured here; the rest is the program's own


def seconds(options: Options, call: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, after three."""
    taken = []
    for number in range(rounds + 3):
        begin = time.perf_counter()
        call()
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        taken += [time.perf_counter() - begin] if number >= 3 else []
    return sorted(taken)[len(taken) // 2]


def images(options: Options) -> Iterator[dict[str, Any]]:
    """Images a second of a training step at 224 pixels, and the memory that it takes."""
    side, batch, rounds = (32, 2, 1) if options.rehearse else (224, 64, 10)
    for name in NETWORKS[:1] if options.rehearse else NETWORKS:
        model = pcenet.create_network(name, num_classes=1000).to(options.device, memory_format=torch.channels_last)
        batches = make_batches(batch, 3, (side, side), options.device)
        step = model_step_call(model, batches, "bf16", segments=False)
        if options.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(options, partial(step, 0), rounds)
        memory = torch.cuda.max_memory_allocated() / 2**20 if options.device.type == "cuda" else None
        yield {"network": name, "side": side, "batch": batch, "images_per_second": batch / taken, "peak_mib": memory}
        del model, step


def graph(options: Options) -> Iterator[dict[str, Any]]:
    """One image through `pce_nano` and its twin, launched operator by operator, and as a CUDA graph."""
    for name in ("pce_nano", "dense_nano"):
        model = pcenet.create_network(name, num_classes=10).to(options.device).eval()
        x = torch.randn(1, 3, 32, 32, device=options.device)
        with torch.inference_mode():
            expected, eager = model(x), seconds(options, partial(model, x), 20)
            record = {"network": name, "eager_ms": 1e3 * eager, "graph_ms": None}
            if options.device.type == "cuda":
                captured, out = capture(model, x)
                captured.replay()
                record |= {"graph_ms": 1e3 * seconds(options, captured.replay, 50), "same": torch.equal(out, expected)}
        yield record


def capture(model: torch.nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the network on what lies in x when it is replayed, and where its result will lie."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = model(x)
    return captured, out


def profile(options: Options) -> Iterator[dict[str, Any]]:
    """Where the time of a layer's training step goes."""
    shape = parse_shape("2x16x16x4" if options.rehearse else "64x128x32x8")
    layer = make_layer(shape, 4, "exchange").to(options.device)
    batches = make_batches(shape.batch, shape.channels, (shape.side, shape.side), options.device, needs_grad=True)
    call = layer_step_call(layer, batches, "bf16")
    call(0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            call(0)
    order = f"self_{options.device.type}_time_total"
    yield {"layer": str(shape), "table": profiler.key_averages().table(sort_by=order, row_limit=30)}


# ---- Steps


class Step(NamedTuple):
    """A step.

    Attributes:
        name: of it and of its results.
        seconds: that it may take.
        command: a command line, or the name of a function above, whose records are written line by line.
        triton: whether the Triton kernels compute.
        rehearsed: whether it ends soon enough on a processor.
    """

    name: str
    seconds: float
    command: list[str] | Callable[[Options], Iterator[dict[str, Any]]]
    triton: bool = True
    rehearsed: bool = True


def steps(options: Options) -> list[Step]:
    """All of them, in order."""
    small = options.rehearse
    bench = ["-m", "pcenet", "bench", "--device", options.device.type, "--rounds", "3" if small else "7"]
    layers = ["--layers", "[2x8x8x4]" if small else LAYERS, "--precisions", "[fp32]" if small else "[bf16,fp32]"]
    layers += ["--borders", "[exchange]"] if small else []
    names = "[pce_nano]" if small else "[pce_nano,pce_tiny]"
    networks = ["--models", names, "--precisions", "[fp32]" if small else "[bf16]"]
    networks += ["--batch-size", "2", "--measures", "[step]"] if small else ["--measures", "[step,latency,memory]"]
    tests = ["-m", "pytest", "-q", "-m", "slow or not slow", str(HERE.parents[1] / "tests" / "test_gpu.py")]
    train = ["-m", "pcenet", "compare", "--models", "[pce_nano,dense_nano,dense_nano_position]", "--data", options.data]
    train += ["--out", str(options.out / "train"), "--device", options.device.type, "--seeds", "1" if small else "3"]
    train += ["--epochs", "1" if small else "15", *(["--max-images", "64", "--workers", "0"] if small else [])]

    def written(name: str) -> list[str]:
        return ["--json", str(options.out / f"{name}.json")]

    return [
        Step("kernels", 180, kernels),
        Step("tests", 90, tests),
        Step("layers", 60, [*bench, *layers, *written("layers")]),
        Step("layers-reference", 60, [*bench, *layers, *written("layers-reference")], triton=False),
        Step("networks", 60, [*bench, *networks, *written("networks")]),
        Step(
            "networks-compiled", 120, [*bench, *networks, "--compile", *written("networks-compiled")], rehearsed=False
        ),
        Step("images", 60, images),
        Step("graph", 30, graph),
        Step("profile", 30, profile),
        Step("train", 480, train),
    ]


def run(step: Step, options: Options, left: float) -> dict[str, Any]:
    """Run a step in a process of its own; what became of it."""
    if left < 5:
        return {"step": step.name, "skipped": "no time was left"}
    if options.rehearse and not step.rehearsed:
        return {"step": step.name, "skipped": "takes minutes on a processor"}
    environment = {**os.environ, library.VARIABLE: "auto"}
    # Kernels are interpreted where they alone are looked at: a network would take hours.
    if step.triton and (not options.rehearse or step.name == "kernels"):
        environment |= {library.VARIABLE: "triton"} | ({"TRITON_INTERPRET": "1"} if options.rehearse else {})
    own = [str(HERE), "--step", step.name, "--out", str(options.out), "--data", options.data]
    command = step.command if isinstance(step.command, list) else [*own, *(["--rehearse"] if options.rehearse else [])]
    begin, log = time.monotonic(), options.out / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(min(step.seconds, left))
        except subprocess.TimeoutExpired:
            status = STOPPED
        finally:  # kill its worker processes, too, or they would disturb the timing of the next step
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1), "log": log.name}


def main(arguments: list[str] | None = None) -> int:
    """Run all steps, or one of them in this process; 0 where each that ran ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as pcenet's --data takes it")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together")
    parser.add_argument("--rehearse", action="store_true", help="a little of everything, on the processor")
    parser.add_argument("--step", help="this one alone, in this process")
    given = parser.parse_args(arguments)
    options = Options(given.out, given.data, given.rehearse)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs on the processor")
    options.out.mkdir(parents=True, exist_ok=True)
    if given.step:
        command = {step.name: step.command for step in steps(options)}[given.step]
        assert not isinstance(command, list)
        with (options.out / f"{given.step}.jsonl").open("w") as file:
            records = [json.dumps(record) for record in written_at_once(command(options), file)]
        return int(any('"ok": false' in record for record in records))
    end, done = time.monotonic() + 60 * given.minutes, []
    for step in steps(options):
        done.append(run(step, options, end - time.monotonic()))
        print(done[-1], flush=True)
        summary = {"machine": machine(options.device), "rehearsal": options.rehearse, "steps": done}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    # A step that is stopped has measured what it could; of kernels all is to be seen.
    ended = {record["step"]: record.get("status", 0) for record in done}
    return int(any(status not in (0, STOPPED) for status in ended.values()) or ended["kernels"] == STOPPED)


def written_at_once(records: Iterator[dict[str, Any]], file: Any) -> Iterator[dict[str, Any]]:
    """The same records, each in the file before the next is asked for."""
    for record in records:
        print(json.dumps(record), file=file, flush=True)
        yield record


if __name__ == "__main__":
    sys.exit(main())
