"""``pcenet bench``: run the comparisons, print them, write them."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pcenet
from pcenet.benchmark.config import BORDERS, BenchConfig, Shape, parse_shape
from pcenet.benchmark.subjects import (
    CLASSES,
    DenseLayer,
    balance,
    forward_call,
    layer_step_call,
    load_rival,
    make_batches,
    make_layer,
    model_step_call,
)
from pcenet.benchmark.targets import Record, judge
from pcenet.benchmark.timing import Call, compare, interleaved, keep_freed_memory, peak_memory
from pcenet.models import create_network, task_of, twin_of
from pcenet.nn import PCELayer
from pcenet.training.device import processor_name, resolve_device, resolve_precision
from pcenet.training.measures import image_size
from pcenet.training.tables import console
from pcenet.writing import filling, write_text

# The table of targets (docs/performance.md).
TABLE_SHAPES = (Shape(64, 64, 32, 8), Shape(64, 128, 16, 4), Shape(16, 64, 56, 14))
TABLE_EXPERTS = (4, 16)
SMALL_PATCHES = (Shape(64, 256, 8, 2), Shape(64, 256, 8, 1))
TABLE_MODELS = ("pce_nano", "pce_tiny")
GROWTH = (4, 64)
# Cost against the number of experts and the side of the map, with patches of an eighth of the side or more.
SCALING_EXPERTS = (1, 2, 4, 8, 16, 32, 64)
SCALING_SIDES = (16, 32, 64, 128)
SCALING_SHAPE = Shape(16, 64, 64, 8)
# Autocast to a type that the processor emulates is slow: fewer rounds.
SLOW_ROUNDS = 5

STEP_NAMES = {"forward": "forward", "step": "forward and backward"}


class Bench:
    """A series of comparisons under one config; ``records`` grows with each."""

    def __init__(self, config: BenchConfig, screen: Console) -> None:
        self.config = config
        self.screen = screen
        self.device = resolve_device(config.device)
        self.records: list[Record] = []
        self.rival = None if config.against is None else load_rival(config.against)

    def rounds(self, precision: str) -> int:
        """Rounds of a comparison."""
        return min(SLOW_ROUNDS, self.config.rounds) if precision == "bf16" else self.config.rounds

    def add(self, about: Record, figures: Mapping[str, float]) -> None:
        """Keep a comparison and print it."""
        record = {**about, **figures}
        self.records.append(record)
        details = ", ".join(
            str(about[key]) if key in ("precision", "border", "dispatch") else f"{key} {about[key]}"
            for key in ("experts", "border", "dispatch", "precision", "batch")
            if about.get(key) is not None
        )
        unit = "MB" if about["measure"] == "memory" else "ms"
        spread = f" ({figures['ratio_low']:.2f} to {figures['ratio_high']:.2f})" if "ratio_low" in figures else ""
        self.screen.print(
            f"{about['name']}, {about['measure']}, {details}: {figures[unit.lower()]:.1f} {unit}, "
            f"{about['beside']} {figures['base_' + unit.lower()]:.1f} {unit}, ratio {figures['ratio']:.2f}{spread}",
            highlight=False,
            soft_wrap=True,
        )

    def prepared(self, module: nn.Module) -> nn.Module:
        """Compiled where the config asks for it."""
        if self.config.compile:
            return cast(nn.Module, torch.compile(module))
        return module

    def layer_batches(self, shape: Shape) -> list[Tensor]:
        """Maps of a shape."""
        size = (shape.side, shape.side)
        return make_batches(shape.batch, shape.channels, size, self.device, needs_grad=True)

    def layer(self, shape: Shape, experts: int, border: str, dispatch: str) -> PCELayer:
        """A layer of a shape."""
        return make_layer(shape, experts, border, dispatch).to(self.device)

    def layers(
        self,
        shape: Shape,
        experts: int,
        *,
        borders: Sequence[str],
        dispatches: Sequence[str],
        precision: str,
        measures: Sequence[str],
        line: Callable[[str, str], str | None] = lambda _measure, _border: None,
    ) -> None:
        """A shape's layers, one for each border and dispatch, beside the dense block and perhaps the rival."""
        dense = DenseLayer(shape.channels).to(self.device).to(memory_format=torch.channels_last)
        batches = self.layer_batches(shape)
        subjects: dict[str, tuple[nn.Module, Record]] = {}
        for border in borders:
            for dispatch in dispatches:
                layer = self.layer(shape, experts, border, dispatch)
                about: Record = {"border": border, "dispatch": dispatch, "max_min_load": balance(layer, batches)}
                subjects[f"{border} {dispatch}"] = (self.prepared(layer), about)
                if self.rival is not None and (border, dispatch) == ("zero", "sorted"):
                    subjects["rival"] = (self.prepared(self.rival(layer)), about)
        common = {
            "what": "layer",
            "name": str(shape),
            "experts": experts,
            "precision": precision,
            "compiled": self.config.compile,
            "batch": shape.batch,
        }
        for measure in measures:
            make: Callable[..., Call] = forward_call if measure == "forward" else layer_step_call
            modules = {"dense": self.prepared(dense)} | {name: module for name, (module, _) in subjects.items()}
            calls: dict[str, Call] = {name: make(module, batches, precision) for name, module in modules.items()}
            seconds = interleaved(calls, rounds=self.rounds(precision))
            for name, (_, about) in subjects.items():
                if name == "rival":
                    beside: Record = {"beside": "rival", "line": "beside one-hot einsum dispatch"}
                    figures = compare(seconds["zero sorted"], seconds["rival"])
                else:
                    beside = {"beside": "dense", "line": line(measure, about["border"])}
                    figures = compare(seconds[name], seconds["dense"])
                figures["images_per_s"] = 1e3 * shape.batch / figures["ms"]
                self.add({**common, **about, **beside, "measure": measure}, figures)

    def growth(self, shape: Shape, few: int, many: int, precision: str, line: str) -> None:
        """A layer with many experts beside one with few, at the same active work."""
        batches = self.layer_batches(shape)
        layers = {count: self.layer(shape, count, "halo", "sorted") for count in (few, many)}
        load = max(balance(layer, batches) for layer in layers.values())
        makers: dict[str, Callable[..., Call]] = {"forward": forward_call, "step": layer_step_call}
        for measure, make in makers.items():
            calls = {str(count): make(layer, batches, precision) for count, layer in layers.items()}
            seconds = interleaved(calls, rounds=self.rounds(precision))
            about = {
                "what": "layer",
                "name": str(shape),
                "experts": many,
                "border": "halo",
                "dispatch": "sorted",
                "precision": precision,
                "compiled": False,
                "batch": shape.batch,
                "max_min_load": load,
                "beside": f"{few} experts",
                "line": line,
                "measure": measure,
            }
            self.add(about, compare(seconds[str(many)], seconds[str(few)]))

    def model(self, name: str, *, precision: str, measures: Sequence[str], in_table: bool = False) -> None:
        """A network beside its dense twin.

        Raises:
            ValueError: for a name without a twin.
        """
        twin = twin_of(name)
        if twin is None:
            raise ValueError(f"models={name!r} has no dense twin to be measured beside; `pcenet models` lists those")
        segments = task_of(name) == "segment"
        # Nothing is dropped, so that both do the same work.
        ours = create_network(name, num_classes=CLASSES, capacity_factor=None)
        dense = create_network(twin, num_classes=CLASSES)
        networks = {"ours": ours, "dense": dense}
        height, width = image_size(ours)
        batch = self.config.batch_size or (128 if height * width <= 64 * 64 else 16)
        batches = make_batches(batch, 3, (height, width), self.device)
        for network in networks.values():
            network.to(self.device).to(memory_format=torch.channels_last)
        load = balance(ours.eval(), batches)
        for measure in measures:
            size = 1 if measure == "latency" else batch
            about = {
                "what": "model",
                "name": name,
                "precision": precision,
                "compiled": self.config.compile,
                "batch": size,
                "max_min_load": load,
                "beside": "dense",
                "measure": measure,
                "line": {
                    "step": "network, training step",
                    "latency": "network, latency at batch 1",
                    "memory": "network, peak memory of a training step",
                }.get(measure)
                if in_table
                else None,
            }
            if measure == "memory":
                ours_peak, dense_peak = (
                    peak_memory(network, partial(model_step_call(network, batches, precision, segments=segments), 0))
                    for network in networks.values()
                )
                figures = {"mb": ours_peak / 1e6, "base_mb": dense_peak / 1e6, "ratio": ours_peak / dense_peak}
                self.add(about, figures)
                continue
            calls: dict[str, Call] = {}
            for key, network in networks.items():
                module = self.prepared(network)
                if measure == "step":
                    calls[key] = model_step_call(module, batches, precision, segments=segments)
                elif measure == "latency":
                    calls[key] = forward_call(module, [images[:1] for images in batches], precision)
                else:
                    calls[key] = forward_call(module, batches, precision)
            # A single image takes so little time that many rounds are cheap.
            rounds = 5 * self.config.rounds if measure == "latency" else self.rounds(precision)
            seconds = interleaved(calls, rounds=rounds)
            figures = compare(seconds["ours"], seconds["dense"])
            figures["images_per_s"] = 1e3 * size / figures["ms"]
            self.add(about, figures)

    def table(self) -> None:
        """Every line of the table of targets."""
        for precision in ("fp32", "bf16"):
            for shape in TABLE_SHAPES:
                for experts in TABLE_EXPERTS:
                    self.layers(
                        shape,
                        experts,
                        borders=BORDERS,
                        dispatches=("sorted",),
                        precision=precision,
                        measures=("forward", "step"),
                        line=lambda measure, border: f"layer, {STEP_NAMES[measure]}, {border}",
                    )
            for shape in SMALL_PATCHES:
                for experts in TABLE_EXPERTS:
                    self.layers(
                        shape,
                        experts,
                        borders=("halo", "exchange"),
                        dispatches=("sorted",),
                        precision=precision,
                        measures=("forward", "step"),
                        line=lambda _measure, _border: "patches of 2x2 and 1x1",
                    )
            for name in TABLE_MODELS:
                measures = ("step", "latency", "memory") if precision == "fp32" else ("step", "latency")
                self.model(name, precision=precision, measures=measures, in_table=True)
            for shape in TABLE_SHAPES:
                self.growth(shape, *GROWTH, precision, "from 4 to 64 experts")

    def scaling(self) -> None:
        """Cost against the number of experts and against the side of the map."""
        for experts in SCALING_EXPERTS:
            self.layers(SCALING_SHAPE, experts, borders=("halo",), **self.own("scaling by experts"))
        for side in SCALING_SIDES:
            batch = SCALING_SHAPE.batch * SCALING_SHAPE.side**2 // side**2
            shape = SCALING_SHAPE._replace(side=side, batch=max(1, batch))
            self.layers(shape, 4, borders=("halo",), **self.own("scaling by side"))

    def own(self, line: str) -> dict[str, Any]:
        """The settings of the scaling suite."""
        return {
            "dispatches": ("sorted",),
            "precision": "fp32",
            "measures": ("step",),
            "line": lambda _measure, _border: line,
        }

    def chosen(self) -> None:
        """The layers and networks that the config names."""
        config = self.config
        for precision in config.precisions:
            for text in config.layers:
                for experts in config.experts:
                    self.layers(
                        parse_shape(text),
                        experts,
                        borders=config.borders,
                        dispatches=config.dispatches,
                        precision=precision,
                        measures=[measure for measure in config.measures if measure in STEP_NAMES],
                    )
            for name in config.models:
                self.model(name, precision=precision, measures=config.measures)


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the config asks for.

    Returns:
        What ``--json`` writes: ``machine``, ``records`` and, for the table, ``verdicts``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    screen = console()
    run = Bench(config, screen)
    report: dict[str, Any] = {"machine": machine(run.device), "config": vars(config)}
    report["machine"]["freed_memory"] = "kept" if keep_freed_memory() else "returned"
    screen.print(describe(report["machine"]), highlight=False, soft_wrap=True)
    if config.layers or config.models:
        run.chosen()
    elif config.suite == "table":
        run.table()
    else:
        run.scaling()
    report |= {"records": run.records, "verdicts": judge(run.records)}
    if report["verdicts"]:
        screen.print(verdict_table(report["verdicts"]))
    if config.plot:
        plot(run.records, config.plot)
    if config.json:
        write_text(Path(config.json), json.dumps(report, indent=1) + "\n")
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "bfloat16": "in hardware" if resolve_precision("auto", device) == "bf16" else "emulated",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pcenet": pcenet.__version__,
    }


def describe(about: Mapping[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{about['processor']}, {about['threads']} threads, bfloat16 {about['bfloat16']}; "
        f"torch {about['torch']}, pcenet {about['pcenet']}, Python {about['python']}; {about['date']}"
    )


def verdict_table(verdicts: Sequence[Record]) -> Table:
    """The table of targets as measured."""
    table = Table("what", "cases", "mean", "worst", "must", "goal", "holds", title="time (or memory) by the base's")
    for verdict in verdicts:
        table.add_row(
            verdict["line"],
            str(verdict["cases"]),
            *(f"{verdict[key]:.2f}" for key in ("mean", "worst", "must", "goal")),
            "yes" if verdict["holds"] else "no",
        )
    return table


def plot(records: Sequence[Record], path: str) -> None:
    """Draw the scaling suite: ratio to the dense block against the number of experts and the side of the map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    series: Iterator[tuple[Any, str, str, Callable[[Record], int]]] = iter(
        (
            (panels[0], "scaling by experts", "experts", lambda record: record["experts"]),
            (panels[1], "scaling by side", "side of the map, pixels", lambda record: parse_shape(record["name"]).side),
        )
    )
    for panel, line, label, place in series:
        chosen = [record for record in records if record["line"] == line]
        x = [place(record) for record in chosen]
        panel.plot(x, [record["ratio"] for record in chosen], marker="o", label="PCE layer")
        panel.fill_between(
            x, [record["ratio_low"] for record in chosen], [record["ratio_high"] for record in chosen], alpha=0.25
        )
        panel.axhline(1, color="black", linewidth=1, label="dense block")
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, map(str, x))
        panel.set_xlabel(label)
        top = max((record["ratio_high"] for record in records), default=1.0)
        panel.set_ylim(0, math.ceil(2 * top) / 2)
    panels[0].set_ylabel("time of a training step")
    panels[0].legend(loc="lower right")
    with filling(Path(path).parent) as folder:
        figure.savefig(folder / Path(path).name)
