"""The options of ``pcenet bench``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

from pcenet.choices import did_you_mean
from pcenet.runs.options import DeviceOption, Option, ThreadsOption, check, check_file

Suite = Literal["table", "scaling"]
Measure = Literal["forward", "step", "latency", "memory"]
LAYER_MEASURES: tuple[Measure, ...] = ("forward", "step")
MODEL_MEASURES: tuple[Measure, ...] = get_args(Measure)
BORDERS = ("zero", "halo", "exchange")
PRECISIONS = ("fp32", "bf16")


class Shape(NamedTuple):
    """Where a layer is measured: B images, C channels in and out, a square map of a side, patches of a side."""

    batch: int
    channels: int
    side: int
    patch: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_shape(text: str) -> Shape:
    """A shape from ``BxCxSIDExPATCH``.

    Raises:
        ValueError: for anything else.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if not numbers or "0" in numbers.groups():
        raise ValueError(
            f"layers={text!r} must be BATCHxCHANNELSxSIDExPATCH in positive whole numbers, such as 64x128x16x4"
        )
    shape = Shape(*map(int, numbers.groups()))
    if shape.patch > shape.side:
        raise ValueError(f"layers={text!r}: the patch of {shape.patch} is larger than the map of {shape.side}")
    return shape


@dataclass(frozen=True)
class BenchConfig:
    """What is measured; the annotations hold the explanations.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    suite: Annotated[
        Suite,
        Option(
            "table: every line of the table of targets. scaling: cost against the number of experts and the side of "
            "the map. Without effect where layers or models are given."
        ),
    ] = "table"
    models: Annotated[
        list[str], Option("Names of PCE networks, each measured beside its dense twin, such as '[pce_nano]'.")
    ] = field(default_factory=list)
    layers: Annotated[
        list[str],
        Option("Single layers, each beside the dense block of its shape: BATCHxCHANNELSxSIDExPATCH, '[64x128x16x4]'."),
    ] = field(default_factory=list)
    measures: Annotated[
        list[str],
        Option(
            "forward (evaluation, no gradients), step (training: forward and backward, and of a network the loss and "
            "the optimiser), latency (evaluation, one image), memory (peak of a training step)."
        ),
    ] = field(default_factory=lambda: list(LAYER_MEASURES))
    experts: Annotated[list[int], Option("Numbers of experts of layers.", at_least=1)] = field(
        default_factory=lambda: [4]
    )
    borders: Annotated[list[str], Option(f"Borders of layers: {', '.join(BORDERS)}.")] = field(
        default_factory=lambda: list(BORDERS)
    )
    precisions: Annotated[list[str], Option("fp32, or bf16: bfloat16 autocast.")] = field(
        default_factory=lambda: ["fp32"]
    )
    batch_size: Annotated[
        int | None, Option("Images of a network's step. Default: 128 up to 64 x 64 pixels, else 16.", at_least=1)
    ] = None
    compile: Annotated[
        bool, Option("Measure both sides under torch.compile; of networks also the time that it takes to compile them.")
    ] = False
    against: Annotated[
        str | None,
        Option(
            "A Python file with make_layer(layer: PCELayer) -> Module, another implementation of a layer: it is run, "
            "and measured beside the layers with border zero."
        ),
    ] = None
    rounds: Annotated[int, Option("Rounds of each comparison, after warming up.", at_least=3)] = 9
    device: DeviceOption = "auto"
    threads: ThreadsOption = None
    json: Annotated[
        str | None,
        Option(
            "Write every figure, with machine and versions, to this file; '{kind}' in its name becomes the kind of "
            "processor, such as avx2. Until all is measured, what there is stands in FILE.part."
        ),
    ] = None
    plot: Annotated[str | None, Option("Draw cost against experts and side to this file (suite scaling).")] = None

    def __post_init__(self) -> None:
        check(self)
        for text in self.layers:
            parse_shape(text)
        allowed = {
            "measures": get_args(Measure),
            "borders": BORDERS,
            "precisions": PRECISIONS,
        }
        for name, choices in allowed.items():
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty; give one or more of {', '.join(choices)}")
            for value in values:
                if value not in choices:
                    raise ValueError(
                        f"{name}={value!r} must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
                    )
        if any(count < 1 for count in self.experts) or not self.experts:
            raise ValueError(f"experts={self.experts} must be whole numbers, each at least 1")
        if self.against is not None and not Path(self.against).is_file():
            raise ValueError(f"against={self.against!r}: there is no such file")
        if self.plot and (self.suite != "scaling" or self.layers or self.models):
            raise ValueError(f"plot={self.plot!r} is drawn of the suite scaling; give --suite scaling, or leave it out")
        if self.layers and not self.models and not {"forward", "step"} & set(self.measures):
            raise ValueError(
                f"measures={self.measures} are of networks; of layers give forward or step, or give models"
            )
        for name in ("json", "plot"):
            check_file(name, getattr(self, name))
