"""The options of ``pcenet explain``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pcenet.choices import Part
from pcenet.runs.config import EvalConfig
from pcenet.runs.options import (
    ClassesOption,
    DeviceOption,
    GreyRangeOption,
    IgnoreIndexOption,
    Option,
    PrecisionOption,
    RunOption,
    ThreadsOption,
    WorkersOption,
    check,
)


@dataclass(frozen=True)
class ExplainConfig:
    """What is explained; the annotations hold the explanations. Creating one checks every value.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    run: RunOption
    data: Annotated[str | None, Option("Images, as in `pcenet train`. Default: those of the run.")] = None
    split: Annotated[Part, Option("Which part of the images; all: whatever the split.")] = "val"
    classes: ClassesOption = None
    ignore_index: IgnoreIndexOption = None
    grey_range: GreyRangeOption = None
    images: Annotated[
        list[str] | str | None,
        Option(
            "What the experts are laid over: an image file, a folder or a .zip archive, or a list of them such as "
            "[a.jpg, b.jpg]. Default: some images of the data."
        ),
    ] = None
    shown: Annotated[int, Option("Lay the experts over at most this many images.", at_least=1, at_most=64)] = 6
    max_images: Annotated[
        int | None, Option("Count over this many images of the data, drawn by the seed. Default: all.", at_least=1)
    ] = None
    intervention_images: Annotated[
        int,
        Option(
            "Try the interventions on at most this many images, drawn by the seed: one pass over them for each "
            "intervention, E + 1 in each layer of E experts, and a few more. 0: no interventions.",
            at_least=0,
        ),
    ] = 500
    twin: Annotated[
        str | None,
        Option(
            "The dense twin, to stand beside the network's score: a run, a model folder or a name, as RUN. Default: "
            "the twin that comes with the package, where RUN is such a name."
        ),
    ] = None
    out: Annotated[
        str | None,
        Option("Folder for the page, new or empty. Default: explanation, with a number where that exists."),
    ] = None
    seed: Annotated[
        int, Option("Decides which images are drawn, random experts and positions.", at_least=0, below=2**32)
    ] = 0
    batch_size: Annotated[
        int | None, Option("Images per step. Default: 256, or 8 to segment, fewer where they are large.", at_least=1)
    ] = None
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)

    def of(self, run: str) -> EvalConfig:
        """The options for opening a network, this one or its twin, with the data."""
        return EvalConfig(
            run=run,
            data=self.data,
            split=self.split,
            classes=self.classes,
            ignore_index=self.ignore_index,
            grey_range=self.grey_range,
        )
