"""The options of ``pcenet predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pcenet.runs.options import (
    DeviceOption,
    GreyRangeOption,
    Option,
    PrecisionOption,
    RunOption,
    ThreadsOption,
    TtaOption,
    WorkersOption,
    check,
)


@dataclass(frozen=True)
class PredictConfig:
    """What ``pcenet predict`` needs to know. Creating one checks every value, as for `TrainConfig`."""

    run: RunOption
    inputs: Annotated[
        list[str],
        Option(
            "Image files, videos (frame by frame), folders (with all that is below them) and .zip archives of images "
            "(read in place).",
            positional=True,
        ),
    ]
    out: Annotated[
        str | None,
        Option("Folder for the results, new or empty. Default: predictions, with a number where that exists."),
    ] = None
    top: Annotated[
        int, Option("Classification: how many classes to list for each image, most probable first.", at_least=1)
    ] = 5
    overlay_opacity: Annotated[
        float,
        Option("Segmentation: how strongly the classes' colours cover the image, from 0 to 1.", at_least=0, at_most=1),
    ] = 0.5
    tta: TtaOption = False
    sliding_window: Annotated[
        bool,
        Option(
            "Segmentation: predict images that are larger than the network's input in windows of its size, at their "
            "own resolution; else they are made smaller. For networks that were trained on parts of such images."
        ),
    ] = False
    overlap: Annotated[
        float,
        Option(
            "Of --sliding-window: the share of its side that a window has in common with the next.", at_least=0, below=1
        ),
    ] = 0.25
    grey_range: GreyRangeOption = None
    routing: Annotated[
        bool, Option("Write the expert of each patch, per layer, to predictions.json as rows of columns.")
    ] = False
    trust_code: Annotated[
        bool, Option("Run FILE.pt2, which is a program and can do whatever you can: only from people you trust.")
    ] = False
    batch_size: Annotated[
        int | None,
        Option("Images, or windows, per step. Default: 256, or 8 to segment, fewer where they are large.", at_least=1),
    ] = None
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
        if self.routing and self.sliding_window:
            raise ValueError(
                "routing: windows overlap, so that a patch of the image has several experts; leave out --routing or "
                "--sliding-window"
            )
        if self.overlap != PredictConfig.overlap and not self.sliding_window:
            raise ValueError(f"overlap {self.overlap:g} has no effect without sliding_window: give both, or neither")
