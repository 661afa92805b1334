"""``pcenet bench``: the clock, the judgement and the routing against numbers worked out by hand; small runs, whole."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from pcenet.benchmark import machine, run, subjects, timing
from pcenet.benchmark.config import BenchConfig, Shape, parse_shape
from pcenet.benchmark.targets import LINES, judge
from pcenet.cli import main
from pcenet.nn import PCELayer

RIVAL = Path(__file__).parents[2] / "benchmarks" / "einsum_dispatch.py"


def test_calls_take_turns_and_every_other_round_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = {name: lambda index, name=name: order.append((name, index)) for name in "ab"}
    seconds = timing.interleaved(calls, rounds=3, warm_up=1)
    assert order == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    # Two looks at the clock for each call, one tick apart.
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_ratios_are_taken_pair_by_pair() -> None:
    """Pairs 2/1, 9/3, 4/4, 10/2, 3/3: sorted 1, 1, 2, 3, 5. The ratio of the medians would be 4/3."""
    figures = timing.compare([2.0, 9.0, 4.0, 10.0, 3.0], [1.0, 3.0, 4.0, 2.0, 3.0])
    assert figures["ratio"] == 2
    assert figures["ratio_low"] == 1
    assert figures["ratio_high"] == 4  # half way from 3 to 5
    assert figures["ms"] == 4000
    assert figures["base_ms"] == 3000


def test_peak_memory_counts_what_lives_at_once() -> None:
    """Weights of 4,000 bytes, then 400,000 beside 800,000, then 400,000 freed before another 400,000."""
    model = nn.Linear(1000, 1, bias=False)

    def step() -> None:
        first = torch.zeros(100_000)
        second = torch.zeros(200_000)
        del first
        third = torch.zeros(100_000)
        del second, third

    assert timing.peak_memory(model, step) == pytest.approx(1_204_000, rel=0.01)


def test_peak_memory_is_that_of_a_step_that_is_not_the_first() -> None:
    """AdamW's two moments are there from the second step on: with parameters and gradients 4 of the same size."""
    model = nn.Linear(100_000, 1, bias=False)
    optimiser = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(1, 100_000)).sum().backward()
        large = torch.zeros(300_000)  # the peak is here, before the optimiser's own
        del large
        optimiser.step()
        optimiser.zero_grad()

    expected = 4 * (2 * 100_000 + 2 * 100_000 + 300_000)  # parameters and gradient, moments, and what lives at once
    assert timing.peak_memory(model, step, optimiser) == pytest.approx(expected, rel=0.15)


def record(line: str | None, ratio: float) -> dict[str, Any]:
    return {"line": line, "ratio": ratio}


@pytest.mark.parametrize(
    ("ratios", "holds"),
    [
        ([0.95, 0.95], True),
        ([0.9, 1.0], True),  # geometric mean 0.9487
        ([0.9, 1.01], False),  # geometric mean 0.9534
        ([0.8, 0.8, 1.13], True),
        ([0.8, 0.8, 1.15], False),  # 1.15 is above 1.2 times 0.95
    ],
)
def test_a_line_holds_by_its_mean_and_its_worst_case(ratios: list[float], holds: bool) -> None:
    name = "layer, forward, zero"
    (verdict,) = judge([*(record(name, ratio) for ratio in ratios), record(None, 99)])
    assert verdict["mean"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert verdict["worst"] == max(ratios)
    assert verdict["must"] == 0.95
    assert verdict["holds"] is holds


@pytest.mark.parametrize(("seconds", "holds"), [(39.0, True), (41.0, False)])
def test_the_time_to_compile_is_judged_in_seconds(seconds: float, holds: bool) -> None:
    (verdict,) = judge([{"line": "time to compile pce_nano's training step", "s": seconds, "ratio": 99.0}])
    assert verdict["mean"] == pytest.approx(seconds)
    assert (verdict["must"], verdict["holds"]) == (40, holds)


@pytest.mark.parametrize(
    ("level", "architecture", "precision", "tiles", "kind", "file"),
    [
        ("AVX2", "x86_64", "fp32", False, "AVX2", "avx2"),
        ("AVX512", "x86_64", "fp32", False, "AVX-512", "avx-512"),
        ("AVX512", "x86_64", "bf16", False, "AVX-512 + bfloat16", "avx-512-bfloat16"),
        ("AVX512", "x86_64", "bf16", True, "AVX-512 + AMX", "avx-512-amx"),
        ("DEFAULT", "x86_64", "fp32", False, "x86_64", "x86-64"),
        ("DEFAULT", "aarch64", "bf16", False, "NEON + bfloat16", "neon-bfloat16"),
    ],
)
def test_kinds_of_processors(
    level: str, architecture: str, precision: str, tiles: bool, kind: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    monkeypatch.setattr("platform.machine", lambda: architecture)
    monkeypatch.setattr(machine, "resolve_precision", lambda _name, _device: precision)
    assert machine.kind_of(torch.device("cpu")) == kind
    assert machine.as_file_name(kind) == file


@pytest.mark.parametrize("experts", [2, 7])
def test_balanced_routing_is_fair(experts: int) -> None:
    layer = PCELayer(6, 6, patch_size=2, num_experts=experts).train()  # it is of evaluation all the same
    nn.init.constant_(layer.router.logits.bias[:1], 3.0)
    batches = subjects.make_batches(16, 6, (12, 12), torch.device("cpu"))
    layer.eval()
    unfair = max(layer.router(batch).expert_counts.max().item() for batch in batches)
    worst = subjects.balance(layer.train(), batches)
    loads = [layer.router(batch).expert_counts for batch in batches]
    assert worst == max(load.max().item() / load.min().item() for load in loads) < 1.6
    assert unfair > 1.6 * max(load.max().item() for load in loads), "nothing was to be done"


def test_balancing_in_training_has_nothing_left_to_do() -> None:
    layer = PCELayer(6, 6, patch_size=2, num_experts=4)
    nn.init.constant_(layer.router.logits.bias[:1], 3.0)
    batches = subjects.make_batches(16, 6, (12, 12), torch.device("cpu"))
    layer(batches[0])
    subjects.balance(layer, batches)
    for batch in batches:
        logits = layer.router.compute_logits(batch)
        load = torch.bincount(logits.argmax(1), minlength=4)
        assert load.max() < 1.6 * load.min()


def test_the_rival_computes_the_layer() -> None:
    layer = PCELayer(6, 6, patch_size=4, num_experts=3, border="zero", capacity_factor=None).double().eval()
    nn.init.normal_(layer.router.logits.weight, std=20)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6, 8, 12, dtype=torch.float64)
    assert (layer.router(x).expert_counts > 0).sum() > 1
    torch.testing.assert_close(subjects.load_rival(str(RIVAL))(layer)(x), layer(x), check_stride=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", r"has no function make_layer"),
        ("1 / 0", r"cannot be run: ZeroDivisionError"),
        ("def", r"cannot be run: SyntaxError"),
    ],
)
def test_a_rival_that_does_not_work_is_named(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rival.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        subjects.load_rival(str(path))
    assert str(path) in str(caught.value)


def test_shapes() -> None:
    assert parse_shape("64x128x16x4") == Shape(batch=64, channels=128, side=16, patch=4)
    assert str(Shape(64, 128, 16, 4)) == "64x128x16x4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["64x128x16"]}, "layers='64x128x16' must be"),
        ({"layers": ["1x1x4x0"]}, "layers='1x1x4x0' must be"),
        ({"layers": ["1x1x4x8"]}, "the patch of 8 is larger than the map of 4"),
        ({"measures": ["foward"]}, "measures='foward' must be one of .*did you mean 'forward'"),
        ({"precisions": ["fp16"]}, "precisions='fp16' must be one of fp32, bf16"),
        ({"borders": []}, "borders is empty"),
        ({"experts": [0]}, r"experts=\[0\] must be"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        ({"suite": "tabel"}, "suite 'tabel' is not one of .*did you mean 'table'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"layers": ["2x4x8x4"], "measures": ["latency"]}, r"measures=\['latency'\] are of networks; of layers give"),
        ({"against": "nowhere.py"}, "against='nowhere.py': there is no such file"),
        ({"plot": "x.png"}, "plot='x.png' is drawn of the suite scaling"),
        ({"json": "nowhere/x.json"}, "json 'nowhere/x.json': there is no folder .*nowhere"),
        ({"json": "."}, "json '.' is a folder; give the name of a file"),
    ],
)
def test_options_that_break_a_rule_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchConfig(**options)


def test_a_model_without_a_twin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--models", "[dense_nano]"]) == 2
    assert "models='dense_nano' has no dense twin" in capsys.readouterr().err


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (1.9, False), (2.0, True), (13.0, True)])
def test_a_busy_machine_is_named(load: float, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert (f"load {load:.1f} on 2 cores" in (machine.other_work() or "")) == busy


@pytest.mark.parametrize(("low", "high", "wide"), [(1.0, 2.0, False), (1.0, 2.1, True)])
def test_a_spread_that_says_nothing_is_named(
    low: float, high: float, wide: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = run.Bench(BenchConfig(layers=["16x32x8x4"]), Console())
    about = {"name": "a", "measure": "forward", "compiled": False, "beside": "dense"}
    bench.add(about, {"ms": 1.0, "base_ms": 1.0, "ratio": 1.5, "ratio_low": low, "ratio_high": high})
    assert ("too wide to say anything" in capsys.readouterr().out) == wide


def test_layers_beside_dense_block_and_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"figures-{machine.as_file_name(machine.kind_of(torch.device('cpu')))}.json"
    named = str(tmp_path / "figures-{kind}.json")
    options = ["--layers", "[2x8x8x4]", "--borders", "[zero, halo]", "--rounds", "3", "--json", named]
    assert main(["bench", *options, "--against", str(RIVAL), "--experts", "[2, 3]"]) == 0
    assert list(tmp_path.iterdir()) == [path], "the unfinished file is gone"
    report = json.loads(path.read_text())
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["torch"] == torch.__version__
    found = [(r["experts"], r["measure"], r["border"], r["beside"]) for r in report["records"]]
    assert sorted(found) == sorted(
        (experts, measure, border, beside)
        for experts in (2, 3)
        for measure in ("forward", "step")
        for border, beside in (("zero", "dense"), ("zero", "rival"), ("halo", "dense"))
    )
    for r in report["records"]:
        assert r["images_per_s"] == pytest.approx(2 / (r["ms"] / 1e3))
    assert "2x8x8x4, forward, experts 2, zero" in capsys.readouterr().out


def test_an_interrupted_run_leaves_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the file of a whole run, which stays as it was."""
    path = tmp_path / "figures.json"
    path.write_text("of last week")
    kept = run.Bench.add

    def add(bench: run.Bench, about: dict[str, Any], figures: dict[str, float]) -> None:
        if about["measure"] == "step":
            raise KeyboardInterrupt
        kept(bench, about, figures)

    monkeypatch.setattr(run.Bench, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run.bench(BenchConfig(layers=["1x8x8x4"], borders=["zero", "halo"], rounds=3, json=str(path)))
    assert path.read_text() == "of last week"
    records = json.loads((tmp_path / "figures.json.part").read_text())["records"]
    assert [(r["measure"], r["border"]) for r in records] == [("forward", "zero"), ("forward", "halo")]


@pytest.mark.slow
def test_every_measure_of_a_network(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    measures = ["forward", "step", "latency", "memory"]
    run.bench(BenchConfig(models=["pce_nano"], measures=measures, batch_size=2, rounds=3, json=str(path)))
    records = json.loads(path.read_text())["records"]
    assert [r["measure"] for r in records] == measures
    assert [r["batch"] for r in records] == [2, 2, 1, 2]
    (memory,) = (r for r in records if r["measure"] == "memory")
    # Parameters, their gradients and the optimiser's two moments, 4 bytes each, are a lower bound.
    assert memory["mb"] > 4 * 4 * 0.85
    assert memory["ratio"] == pytest.approx(memory["mb"] / memory["base_mb"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("native", [False, True])
def test_the_table_has_every_line(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny shapes in place of its own; those of bfloat16 where the processor has it."""
    monkeypatch.setattr(run, "TABLE_SHAPES", (Shape(1, 8, 8, 4),))
    monkeypatch.setattr(run, "SMALL_PATCHES", (Shape(1, 8, 4, 2), Shape(1, 8, 4, 1)))
    monkeypatch.setattr(run, "TABLE_EXPERTS", (2,))
    monkeypatch.setattr(run, "TABLE_MODELS", ("pce_nano",))
    monkeypatch.setattr(run, "prepared", lambda module, _compiled: module)  # compiling takes minutes
    monkeypatch.setattr(run, "resolve_precision", lambda _name, _device: "bf16" if native else "fp32")
    report = run.bench(BenchConfig(rounds=3, batch_size=2, against=str(RIVAL)))
    measured = [verdict["line"] for verdict in report["verdicts"]]
    assert measured == [line.name for line in LINES if native or "bfloat16" not in line.name]
    assert {r["precision"] for r in report["records"]} == ({"fp32", "bf16"} if native else {"fp32"})
    out = capsys.readouterr().out
    assert "holds" in out
    assert ("not measured here: layer, forward, bfloat16" in out) is not native


def test_layers_of_the_table_are_those_of_the_page() -> None:
    """As docs/performance.md lists them."""
    assert list(map(str, run.TABLE_SHAPES)) == ["64x64x32x8", "64x128x16x4", "16x64x56x14"]
    assert {str(shape) for shape in run.SMALL_PATCHES} == {
        f"64x{channels}x8x{patch}" for channels in (48, 96, 256) for patch in (1, 2)
    }


def test_scaling_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "SCALING_SHAPE", Shape(1, 8, 16, 4))
    monkeypatch.setattr(run, "SCALING_SIDES", (8, 16))
    monkeypatch.setattr(run, "SCALING_EXPERTS", (1, 2))
    path = tmp_path / "scaling.png"
    run.bench(BenchConfig(suite="scaling", rounds=3, plot=str(path)))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_time_to_compile_is_measured_anew_each_time() -> None:
    layer = subjects.DenseLayer(8).eval()
    batches = subjects.make_batches(1, 8, (8, 8), torch.device("cpu"))
    for _ in range(2):
        with timing.fresh_compiler():
            call = subjects.forward_call(run.prepared(layer, True), batches, "fp32")
            (first,) = timing.first_calls({"": call})[""]
            (second,) = timing.first_calls({"": call})[""]
        # Compiling takes a second or more, a call of what is compiled less than a millisecond.
        assert first > 20 * second


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense block stands in for each network, which take minutes."""

    def create(name: str, **_options: Any) -> nn.Module:
        block = subjects.DenseLayer(3)
        return block if name == "dense_nano" else nn.Sequential(block, nn.ReLU())

    monkeypatch.setattr(run, "create_network", create)
    monkeypatch.setattr(run, "balance", lambda _model, _batches: 1.0)
    monkeypatch.setattr(run, "image_size", lambda _model: (8, 8))
    options = BenchConfig(models=["pce_nano"], measures=["latency"], batch_size=2, rounds=3, compile=True)
    compiling, running = run.bench(options)["records"]
    assert (compiling["measure"], running["measure"]) == ("compile latency", "latency")
    assert compiling["compiled"]
    assert running["compiled"]
    assert compiling["s"] > 0.1
    assert running["ms"] < 100


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_are_measured() -> None:
    report = run.bench(BenchConfig(layers=["1x8x8x4"], borders=["zero"], measures=["forward"], rounds=3, compile=True))
    assert all(r["compiled"] for r in report["records"])
