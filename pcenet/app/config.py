"""The options of ``pcenet app``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pcenet.choices import Part
from pcenet.runs.options import (
    ClassesOption,
    DeviceOption,
    GreyRangeOption,
    IgnoreIndexOption,
    Option,
    PrecisionOption,
    RunOption,
    ThreadsOption,
    check,
)


@dataclass(frozen=True)
class AppConfig:
    """What ``pcenet app`` needs to know; the annotations hold the explanations.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    run: RunOption
    port: Annotated[int, Option("Where the page is; 0: any free port.", at_least=0, at_most=65535)] = 7860
    host: Annotated[
        str, Option("Address to listen on. With another than 127.0.0.1 whoever reaches this machine can use the page.")
    ] = "127.0.0.1"
    data: Annotated[
        str | None,
        Option(
            "Images to offer as samples, as in `pcenet train`. Default: the run's own images, if they can be opened."
        ),
    ] = None
    split: Annotated[Part, Option("Which part of these images; all: whatever the split.")] = "val"
    classes: ClassesOption = None
    ignore_index: IgnoreIndexOption = None
    grey_range: GreyRangeOption = None
    max_pixels: Annotated[int, Option("Pixels of an image that somebody drops on the page, at most.", at_least=1)] = (
        25_000_000
    )
    max_megabytes: Annotated[int, Option("Size of its file, at most.", at_least=1)] = 20
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
