"""Exported files: what they carry, and running them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.choices import Task, check_grey_range

SUFFIXES = (".onnx", ".pt2")
Runner = Callable[[Tensor], list[Tensor]]
METADATA = "pcenet"  # the key of what a file carries
EXTRA = "metadata.json"  # and the name that a program of torch.export has for it


def is_exported(path: str | Path) -> bool:
    """Whether a path is a file named like one that `pcenet export` writes."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file()


class ExportedNet(nn.Module):
    """An exported file as a module that computes on the processor; it has no parameters.

    Args:
        path: a file that ``pcenet export`` wrote.
        threads: of onnxruntime; None: its own choice.

    Attributes:
        metadata: what the file carries.
        task, class_names, num_classes, grey_range, pretrained_cfg: as those of the network that was exported.
        output_names: logits first.

    Raises:
        ValueError: if the file is broken, or not one of ours.
        ModuleNotFoundError: for an ONNX file where onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        super().__init__()
        self._run, carried = _open(Path(path), threads)
        try:
            self.metadata: dict[str, Any] = json.loads(carried[METADATA])
            self.task: Task = self.metadata["task"]
            self.class_names: list[str] | None = self.metadata["class_names"]
            self.num_classes: int = self.metadata["num_classes"]
            self.grey_range: list[int] | None = self.metadata.get("grey_range")  # which older files do not carry
            check_grey_range(self.grey_range)
            self.pretrained_cfg: dict[str, Any] = self.metadata["preprocessing"]
            self.output_names: list[str] = self.metadata["outputs"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: it does not carry what pcenet export writes into a file; export it anew"
            ) from error
        self.path = path

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Everything that the file computes of images ``[B, C, H, W]``, in the order of `output_names`.

        Raises:
            ValueError: for images of a size that the file does not take.
        """
        _, height, width = self.metadata["input_size"]
        multiple: int | None = self.metadata["size_multiple"]
        if multiple is None and x.shape[2:] != (height, width):
            raise ValueError(
                f"{self.path} takes images of {height} x {width} px, not {x.shape[2]} x {x.shape[3]}; export with "
                "--dynamic batch,size"
            )
        if multiple is not None and (x.shape[2] % multiple or x.shape[3] % multiple):
            raise ValueError(
                f"{self.path} takes images whose sides are multiples of {multiple} px, not {x.shape[2]} x {x.shape[3]}"
            )
        if self.metadata["fixed_batch"]:
            each = [self._run(image[None]) for image in x]
            return [torch.cat(parts) for parts in zip(*each, strict=True)]
        return self._run(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits."""
        return self.outputs(x)[0]


def run_with(path: Path, constants: Mapping[str, Tensor]) -> Runner:
    """What a file computes of images when some of its constants have other values.

    Args:
        path: the file.
        constants: the new values by name.

    Raises:
        ValueError: if it has none of these constants.
    """
    if path.suffix != ".onnx":
        return _run_program(_load_program(path)[0], constants)
    onnx = require("onnx")
    model = onnx.load(str(path))
    found = [each for each in model.graph.initializer if each.name in constants]
    if not found:
        raise ValueError(f"{path} has none of the constants {', '.join(constants)}")
    for initializer in found:
        initializer.CopyFrom(onnx.numpy_helper.from_array(constants[initializer.name].numpy(), initializer.name))
    return _run_session(_open_session(model.SerializeToString(), path, None))


def _open(path: Path, threads: int | None) -> tuple[Runner, Mapping[str, str]]:
    if path.suffix == ".onnx":
        session = _open_session(str(path), path, threads)
        return _run_session(session), session.get_modelmeta().custom_metadata_map
    program, carried = _load_program(path)
    return _run_program(program, {}), {METADATA: carried}


def _open_session(content: str | bytes, path: Path, threads: int | None) -> Any:
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, of no common class
        raise ValueError(f"{path}: onnxruntime cannot read it: {error}") from error


def _run_session(session: Any) -> Runner:
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {"images": x.contiguous().numpy()})]


def _load_program(path: Path) -> tuple[torch.export.ExportedProgram, str]:
    extra = {EXTRA: ""}
    try:
        return torch.export.load(str(path), extra_files=extra), extra[EXTRA]
    except Exception as error:  # whatever a damaged archive brings about
        raise ValueError(f"{path}: torch.export cannot read it: {error}") from error


def _run_program(program: torch.export.ExportedProgram, constants: Mapping[str, Tensor]) -> Runner:
    module = program.module()
    with torch.no_grad():
        for name, value in constants.items():
            module.get_parameter(name).copy_(value)

    def run(x: Tensor) -> list[Tensor]:
        out = module(x.contiguous())
        return [out] if isinstance(out, Tensor) else list(out)

    return run


def require(package: str) -> Any:
    """A package of the extra ``export``.

    Raises:
        ModuleNotFoundError: where it is not installed; says how.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"ONNX files need {package}: pip install 'pcenet[export]'", name=package) from error


def output_names(layers: Sequence[str]) -> list[str]:
    """Names of a file's outputs, where layers of these names give their routing."""
    return ["logits", *(f"{kind}:{layer}" for layer in layers for kind in ("expert", "gate"))]
