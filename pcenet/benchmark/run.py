"""``pcenet bench``: run the comparisons, print them, write them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from pcenet.benchmark.config import BORDERS, LAYER_MEASURES, BenchConfig, Shape, parse_shape
from pcenet.benchmark.machine import as_file_name, describe, machine, other_work
from pcenet.benchmark.showing import plot, verdict_table
from pcenet.benchmark.subjects import (
    CLASSES,
    DenseLayer,
    balance,
    forward_call,
    layer_step_call,
    load_rival,
    make_batches,
    make_layer,
    make_optimiser,
    model_step_call,
)
from pcenet.benchmark.targets import LINES, Record, in_precision, judge
from pcenet.benchmark.timing import (
    Call,
    compare,
    first_calls,
    fresh_compiler,
    interleaved,
    keep_freed_memory,
    peak_memory,
)
from pcenet.models import create_network, task_of, twin_of
from pcenet.models.preprocessing import image_size
from pcenet.reporting.tables import console
from pcenet.runtime.device import resolve_device, resolve_precision, set_precision
from pcenet.writing import write_json

WIDE = 2.0  # a ratio whose upper quartile is more than this many times its lower one says nothing
# The table of targets (docs/performance.md).
TABLE_SHAPES = (Shape(64, 64, 32, 8), Shape(64, 128, 16, 4), Shape(16, 64, 56, 14))
TABLE_EXPERTS = (4, 16)
SMALL_PATCHES = tuple(Shape(64, channels, 8, patch) for channels in (48, 96, 256) for patch in (2, 1))
SMALL_BORDERS = ("halo", "exchange")
TABLE_MODELS = ("pce_nano", "pce_tiny")
TABLE_SEGMENTER = "pce_unet_nano"
GROWTH = (4, 64)
# Cost against the number of experts and the side of the map, with patches of an eighth of the side or more.
SCALING_EXPERTS = (1, 2, 4, 8, 16, 32, 64)
SCALING_SIDES = (16, 32, 64, 128)
SCALING_SHAPE = Shape(16, 64, 64, 8)

UNITS = {"ms": "ms", "s": "s", "mb": "MB"}
STEP_NAMES = {"forward": "forward", "step": "forward and backward"}
EAGER_LINES = {"step": "network, training step", "latency": "network, batch 1"}
COMPILED_LINES = {"step": "network, both compiled, training step", "latency": "network, both compiled, batch 1"}
SEGMENTER_LINES = {"step": "network that segments, training step", "latency": "network that segments, batch 1"}
MEMORY_LINES = {"memory": "network, peak memory of a training step"}
COMPILE_TIME_LINES = {"pce_nano": {"compile step": "time to compile pce_nano's training step"}}


log = logging.getLogger(__name__)


class Bench:
    """A series of comparisons under one config; the records of ``report`` grow with each."""

    def __init__(self, config: BenchConfig, screen: Console) -> None:
        self.config = config
        self.screen = screen
        self.device = resolve_device(config.device)
        if self.device.type == "mps":
            raise ValueError("device 'mps': how long a Mac's GPU takes is not measured; use --device cpu or cuda")
        set_precision("fp32", self.device)
        self.rival = None if config.against is None else load_rival(config.against)
        self.report: dict[str, Any] = {"machine": machine(self.device), "config": vars(config), "records": []}
        kind = as_file_name(self.report["machine"]["kind"])
        self.file = None if config.json is None else Path(config.json.replace("{kind}", kind))

    @property
    def records(self) -> list[Record]:
        """All comparisons so far."""
        records: list[Record] = self.report["records"]
        return records

    def add(self, about: Record, figures: Mapping[str, float]) -> None:
        """Keep a comparison, in the unfinished file too, and print it."""
        self.records.append({**about, **figures})
        if self.file is not None:
            write_json(unfinished(self.file), self.report)
        details = ", ".join(
            str(about[key]) if key in ("precision", "border") else f"{key} {about[key]}"
            for key in ("experts", "border", "precision", "batch")
            if about.get(key) is not None
        )
        unit = next(unit for unit in ("ms", "s", "mb") if unit in figures)
        spread = ""
        if "ratio_low" in figures:
            low, high = figures["ratio_low"], figures["ratio_high"]
            spread = f" ({low:.2f} to {high:.2f}{', too wide to say anything' if high > WIDE * low else ''})"
        self.screen.print(
            f"{about['name']}, {about['measure']}, {details}{', compiled' if about['compiled'] else ''}: "
            f"{figures[unit]:.1f} {UNITS[unit]}, {about['beside']} {figures[f'base_{unit}']:.1f} {UNITS[unit]}, "
            f"ratio {figures['ratio']:.2f}{spread}",
            highlight=False,
            soft_wrap=True,
        )

    def finish(self) -> dict[str, Any]:
        """Judge the records, write the file, and take the unfinished one away."""
        self.report["verdicts"] = judge(self.records)
        if self.file is not None:
            write_json(self.file, self.report)
            unfinished(self.file).unlink(missing_ok=True)
        return self.report

    def layer_batches(self, shape: Shape) -> list[Tensor]:
        """Maps of a shape."""
        size = (shape.side, shape.side)
        return make_batches(shape.batch, shape.channels, size, self.device, needs_grad=True)

    def layers(
        self,
        shape: Shape,
        experts: int,
        *,
        borders: Sequence[str],
        precision: str,
        measures: Sequence[str],
        line: Callable[[str, str], str | None] = lambda _measure, _border: None,
    ) -> None:
        """A shape's layers, one per border, compared with the dense block and, if given, the rival."""
        compiled = self.config.compile
        dense = DenseLayer(shape.channels).to(self.device).to(memory_format=torch.channels_last)
        batches = self.layer_batches(shape)
        modules: dict[str, nn.Module] = {"dense": dense}
        loads: dict[str, float] = {}
        for border in borders:
            layer = make_layer(shape, experts, border).to(self.device)
            loads[border] = balance(layer, batches)
            modules[border] = layer
            if self.rival is not None and border == "zero":
                modules["rival"] = self.rival(layer)
        common = {
            "what": "layer",
            "name": str(shape),
            "experts": experts,
            "precision": precision,
            "compiled": compiled,
            "batch": shape.batch,
        }
        modules = {name: prepared(module, compiled) for name, module in modules.items()}
        for measure in measures:
            make: Callable[..., Call] = forward_call if measure == "forward" else layer_step_call
            calls = {name: make(module, batches, precision) for name, module in modules.items()}
            seconds = interleaved(calls, rounds=self.config.rounds)
            pairs = [(border, "dense", line(measure, border)) for border in borders]
            if "rival" in seconds:
                pairs.append(("zero", "rival", in_precision("relative to one-hot einsum dispatch", precision)))
            for border, beside, in_table in pairs:
                about = {"border": border, "max_min_load": loads[border], "beside": beside, "line": in_table}
                figures = compare(seconds[border], seconds[beside])
                figures["images_per_s"] = 1e3 * shape.batch / figures["ms"]
                self.add({**common, **about, "measure": measure}, figures)

    def growth(self, shape: Shape, few: int, many: int, precision: str, line: str) -> None:
        """A layer with many experts compared with one with few, at the same active work."""
        batches = self.layer_batches(shape)
        layers = {count: make_layer(shape, count, "halo").to(self.device) for count in (few, many)}
        load = max(balance(layer, batches) for layer in layers.values())
        makers: dict[str, Callable[..., Call]] = {"forward": forward_call, "step": layer_step_call}
        for measure, make in makers.items():
            calls = {str(count): make(layer, batches, precision) for count, layer in layers.items()}
            seconds = interleaved(calls, rounds=self.config.rounds)
            about = {
                "what": "layer",
                "name": str(shape),
                "experts": many,
                "border": "halo",
                "precision": precision,
                "compiled": False,
                "batch": shape.batch,
                "max_min_load": load,
                "beside": f"{few} experts",
                "line": line,
                "measure": measure,
            }
            self.add(about, compare(seconds[str(many)], seconds[str(few)]))

    def model(
        self,
        name: str,
        *,
        precision: str,
        measures: Sequence[str],
        compiled: bool = False,
        lines: Mapping[str, str] | None = None,
    ) -> None:
        """A network compared with its dense twin.

        Args:
            name: of the network.
            precision: ``"fp32"`` or ``"bf16"``.
            measures: those of the config.
            compiled: both under torch.compile. The time to compile them is then a record too, measured as
                ``compile`` and the measure.
            lines: the line of the table that a measure belongs to.

        Raises:
            ValueError: for a name without a twin.
        """
        twin = twin_of(name)
        if twin is None:
            raise ValueError(f"models={name!r} has no dense twin to compare it with; `pcenet models` lists those")
        # Nothing is dropped, so that both do the same work.
        ours = create_network(name, num_classes=CLASSES, capacity_factor=None)
        dense = create_network(twin, num_classes=CLASSES)
        networks = {"ours": ours, "dense": dense}
        height, width = image_size(ours)
        batch = self.config.batch_size or (128 if height * width <= 64 * 64 else 16)
        batches = make_batches(batch, 3, (height, width), self.device)
        for network in networks.values():
            network.to(self.device).to(memory_format=torch.channels_last)
        common = {
            "what": "model",
            "name": name,
            "precision": precision,
            "max_min_load": balance(ours.eval(), batches),
            "beside": "dense",
        }

        for measure in measures:
            size = 1 if measure == "latency" else batch
            images = [one[:size] for one in batches]
            make: Callable[..., Call] = (
                partial(model_step_call, batches=images, precision=precision, segments=task_of(name) == "segment")
                if measure in ("step", "memory")
                else partial(forward_call, batches=images, precision=precision)
            )
            # Memory is that of networks that are not compiled.
            under_compile = compiled and measure != "memory"
            for measured, figures in self.model_figures(networks, make, measure, under_compile):
                if "ms" in figures:
                    figures["images_per_s"] = 1e3 * size / figures["ms"]
                about = {"compiled": under_compile, "batch": size, "measure": measured}
                self.add({**common, **about, "line": (lines or {}).get(measured)}, figures)

    def model_figures(
        self, networks: Mapping[str, nn.Module], make: Callable[..., Call], measure: str, compiled: bool
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """What was measured, and its figures: of ``"ours"`` relative to ``"dense"``."""
        if measure == "memory":

            def peak(network: nn.Module) -> int:
                optimiser = make_optimiser(network)
                return peak_memory(network, partial(make(network, optimiser=optimiser), 0), optimiser)

            ours, dense = peak(networks["ours"]), peak(networks["dense"])
            yield measure, {"mb": ours / 1e6, "base_mb": dense / 1e6, "ratio": ours / dense}
            return
        with fresh_compiler() if compiled else nullcontext():
            calls = {key: make(prepared(network, compiled)) for key, network in networks.items()}
            if compiled:
                first = {key: seconds for key, (seconds,) in first_calls(calls).items()}
                figures = {"s": first["ours"], "base_s": first["dense"], "ratio": first["ours"] / first["dense"]}
                yield f"compile {measure}", figures
            # A single image takes so little time that many rounds are cheap.
            seconds = interleaved(calls, rounds=(5 if measure == "latency" else 1) * self.config.rounds)
        yield measure, compare(seconds["ours"], seconds["dense"])

    def table(self) -> None:
        """Every line of the table of targets; those of bfloat16 where the processor has it."""
        for precision in ("fp32", "bf16") if resolve_precision("auto", self.device) == "bf16" else ("fp32",):
            for shapes, borders, line in (
                (TABLE_SHAPES, BORDERS, layer_line),
                (SMALL_PATCHES, SMALL_BORDERS, small_patches_line),
            ):
                for shape, experts in itertools.product(shapes, TABLE_EXPERTS):
                    self.layers(
                        shape,
                        experts,
                        borders=borders,
                        precision=precision,
                        measures=LAYER_MEASURES,
                        line=partial(line, precision),
                    )
            for shape in TABLE_SHAPES:
                self.growth(shape, *GROWTH, precision, in_precision("from 4 to 64 experts", precision))
            for name in TABLE_MODELS:
                self.table_model(name, precision)
            lines = {measure: in_precision(line, precision) for measure, line in SEGMENTER_LINES.items()}
            self.model(TABLE_SEGMENTER, precision=precision, measures=list(lines), lines=lines)

    def table_model(self, name: str, precision: str) -> None:
        """A network's lines in a precision: eager and compiled, and in float32 memory and the time to compile it."""
        eager, compiled = (
            {measure: in_precision(line, precision) for measure, line in lines.items()}
            for lines in (EAGER_LINES, COMPILED_LINES)
        )
        if precision == "fp32":
            eager |= MEMORY_LINES
            compiled |= COMPILE_TIME_LINES.get(name, {})
        self.model(name, precision=precision, measures=list(eager), lines=eager)
        self.model(name, precision=precision, measures=list(COMPILED_LINES), lines=compiled, compiled=True)

    def scaling(self) -> None:
        """Cost against the number of experts and against the side of the map."""
        for experts in SCALING_EXPERTS:
            self.scaling_layers(SCALING_SHAPE, experts, "scaling by experts")
        for side in SCALING_SIDES:
            batch = SCALING_SHAPE.batch * SCALING_SHAPE.side**2 // side**2
            self.scaling_layers(SCALING_SHAPE._replace(side=side, batch=max(1, batch)), 4, "scaling by side")

    def scaling_layers(self, shape: Shape, experts: int, line: str) -> None:
        """A point of the scaling suite."""
        self.layers(
            shape, experts, borders=("halo",), precision="fp32", measures=("step",), line=lambda _measure, _border: line
        )

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
                        precision=precision,
                        measures=[measure for measure in config.measures if measure in STEP_NAMES],
                    )
            for name in config.models:
                self.model(name, precision=precision, measures=config.measures, compiled=config.compile)


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the config asks for.

    Returns:
        What ``--json`` writes: ``machine``, ``config``, ``records`` and, for the table, ``verdicts``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    screen = console()
    run = Bench(config, screen)
    run.report["machine"]["freed_memory"] = "kept" if keep_freed_memory() else "returned"
    screen.print(describe(run.report["machine"]), highlight=False, soft_wrap=True)
    if warning := other_work():
        log.warning("%s", warning)
    whole_table = not (config.layers or config.models) and config.suite == "table"
    if config.layers or config.models:
        run.chosen()
    elif whole_table:
        run.table()
    else:
        run.scaling()
    report = run.finish()
    if report["verdicts"]:
        screen.print(verdict_table(report["verdicts"]))
    if whole_table:
        found = {verdict["line"] for verdict in report["verdicts"]}
        for line in LINES:
            if line.name not in found:
                screen.print(f"not measured here: {line.name}", highlight=False, soft_wrap=True)
    if config.plot:
        plot(run.records, config.plot)
    return report


def layer_line(precision: str, measure: str, border: str) -> str:
    """The line of a layer of the table: one for each border, one for all of them in bfloat16."""
    return f"layer, {STEP_NAMES[measure]}, {'bfloat16' if precision == 'bf16' else border}"


def small_patches_line(precision: str, measure: str, _border: str) -> str:
    """The line of a layer with small patches: one for all borders."""
    return in_precision(f"patches of 2x2 and 1x1, {STEP_NAMES[measure]}", precision)


def prepared(module: nn.Module, compiled: bool) -> nn.Module:
    """The module, under torch.compile where that is asked for."""
    return cast(nn.Module, torch.compile(module)) if compiled else module


def unfinished(path: Path) -> Path:
    """Where the records stand until all are there."""
    return path.with_name(f"{path.name}.part")
