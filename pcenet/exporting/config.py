"""The options of ``pcenet export``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pcenet.choices import Part
from pcenet.runs.options import Option, RunOption, ThreadsOption, check

Format = Literal["onnx", "pt2"]
AXES = ("batch", "size")


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and how. Creating one checks every value.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    run: RunOption
    format: Annotated[
        Format,
        Option("onnx: for onnxruntime and others; pt2: a program of torch.export, to be run by those who trust you."),
    ] = "onnx"
    out: Annotated[
        str | None,
        Option("The file, which must not exist. Default: the network's name, here, with the format's ending."),
    ] = None
    dynamic: Annotated[
        str,
        Option(
            "What the file leaves open: batch, or batch,size for images of several sizes too; none: nothing, for one "
            "image of the network's size at a time."
        ),
    ] = "batch"
    routing: Annotated[bool, Option("The expert of each patch, and its gate value, as further outputs.")] = False
    int8: Annotated[
        bool,
        Option(
            "ONNX: int8 weights where matrices are multiplied; the accuracy before and after is measured on --data."
        ),
    ] = False
    data: Annotated[str | None, Option("For --int8: images, as in `pcenet train`.")] = None
    split: Annotated[Part, Option("For --int8: which part of the images.")] = "val"
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
        if self.int8 and (self.data is None or self.format != "onnx"):
            raise ValueError("int8 is for --format onnx, and measures what it costs: give --data SOURCE")
        if self.data is not None and not self.int8:
            raise ValueError("data has no effect without --int8; leave it out")
        unknown = sorted(self.open_axes - set(AXES))
        if unknown:
            raise ValueError(f"dynamic {self.dynamic!r}: {unknown[0]!r} is none of {', '.join(AXES)}; or give none")

    @property
    def open_axes(self) -> set[str]:
        """``batch``, ``size``, both or neither."""
        return set() if self.dynamic == "none" else {word.strip() for word in self.dynamic.split(",")}
