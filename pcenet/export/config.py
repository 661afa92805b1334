"""The options of ``pcenet export``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pcenet.training.config import Option, RunOption, ThreadsOption, check

Format = Literal["onnx", "pt2"]
AXES = ("batch", "size")


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and how. Creating one checks every value.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    run: RunOption
    format: Annotated[Format, Option("onnx: for onnxruntime and others; pt2: a program of torch.export.")] = "onnx"
    out: Annotated[
        str | None, Option("The file, which must not exist; null: the network's name, here, with the format's ending.")
    ] = None
    dynamic: Annotated[
        str,
        Option(
            "What the file leaves open: batch, or batch,size for images of several sizes too; none: nothing, for one "
            "image of the network's size at a time."
        ),
    ] = "batch"
    routing: Annotated[bool, Option("The expert of each patch, and its gate value, as further outputs.")] = False
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
        unknown = sorted(self.open_axes - set(AXES))
        if unknown:
            raise ValueError(f"dynamic {self.dynamic!r}: {unknown[0]!r} is none of {', '.join(AXES)}; or give none")

    @property
    def open_axes(self) -> set[str]:
        """``batch``, ``size``, both or neither."""
        return set() if self.dynamic == "none" else {word.strip() for word in self.dynamic.split(",")}
