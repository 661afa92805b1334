"""Exported files: what they carry, and running them.

An ONNX file is a graph, which onnxruntime computes. A ``.pt2`` file is a program: torch.export reads pickles in it, and
has no way to read it without running what a stranger put there. So it is only ever read on the user's word.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.choices import GreyRange, TaskName, check_grey_range
from pcenet.models.limits import (
    LARGEST_SIDE,
    check_class_names,
    check_image_shape,
    check_mask_values,
    check_num_classes,
    check_pixel_classes,
    check_preprocessing,
    check_task,
    excerpt,
    is_whole,
    read_json,
)

SUFFIXES = (".onnx", ".pt2")
Runner = Callable[[Tensor], list[Tensor]]
METADATA = "pcenet"  # the key of what a file carries
EXTRA = "metadata.json"  # and the name that a program of torch.export has for it
SILENT = 4  # of onnxruntime's levels


def is_exported(path: str | Path) -> bool:
    """Whether a path is a file named like one that `pcenet export` writes."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file()


class ExportedNet(nn.Module):
    """An exported file as a module that computes on the processor; it has no parameters.

    Args:
        path: a file that ``pcenet export`` wrote.
        threads: of onnxruntime; None: its own choice.
        trust_code: whether to run a ``.pt2`` file, which is a program and can do whatever you can; an ONNX file needs
            no trust.

    Attributes:
        metadata: what the file carries.
        task, class_names, num_classes, grey_range, mask_values, pretrained_cfg: copied from the exported network.
        size_multiple: the sides of its images are multiples of it; None: it takes images of one size.
        output_names: logits first.

    Raises:
        ValueError: if the file is broken, or not one of ours, or a program that is not trusted.
        ModuleNotFoundError: for an ONNX file where onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, trust_code: bool = False) -> None:
        super().__init__()
        self._run, carried = _open(Path(path), threads, trust_code)
        self.metadata = read_metadata(carried, path)
        self.task: TaskName = self.metadata["task"]
        self.class_names: list[str] | None = self.metadata["class_names"]
        self.num_classes: int = self.metadata["num_classes"]
        self.grey_range: GreyRange | None = self.metadata.get("grey_range")  # which older files do not carry
        self.mask_values: list[int] | None = self.metadata.get("mask_values")  # likewise
        self.pretrained_cfg: dict[str, Any] = self.metadata["preprocessing"]
        self.size_multiple: int | None = self.metadata["size_multiple"]
        self.output_names: list[str] = self.metadata["outputs"]
        self.path = path

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Everything that the file computes of images ``[B, C, H, W]``, in the order of `output_names`.

        Raises:
            ValueError: for images of a size that the file does not take, and where what it computes are not the logits
                that it promises.
        """
        _, height, width = self.metadata["input_size"]
        multiple = self.size_multiple
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
            each = [self._logits_first(image[None]) for image in x]
            return [torch.cat(parts) for parts in zip(*each, strict=True)]
        return self._logits_first(x)

    def _logits_first(self, x: Tensor) -> list[Tensor]:
        try:
            outputs = self._run(x)
        except Exception as error:  # onnxruntime's own, of no common class, or whatever a program raises
            raise ValueError(f"{self.path}: it cannot be computed: {error}") from error
        wanted = (len(x), self.num_classes, *(x.shape[2:] if self.task == "segment" else ()))
        found = tuple(outputs[0].shape)
        if (self.num_classes and found != wanted) or not outputs[0].is_floating_point():
            raise ValueError(
                f"{self.path}: it computes {outputs[0].dtype} {found}, not the logits {wanted}; export anew"
            )
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits."""
        return self.outputs(x)[0]


def run_with(path: Path, constants: Mapping[str, Tensor], *, trust_code: bool = False) -> Runner:
    """What a file computes of images when some of its constants have other values.

    Args:
        path: the file.
        constants: the new values by name.
        trust_code: see `ExportedNet`.

    Raises:
        ValueError: if it has none of these constants, or is a program that is not trusted.
    """
    if path.suffix != ".onnx":
        return _run_program(_load_program(path, trust_code)[0], constants)
    onnx = require("onnx")
    model = onnx.load(str(path))
    found = [each for each in model.graph.initializer if each.name in constants]
    if not found:
        raise ValueError(f"{path} has none of the constants {', '.join(constants)}")
    for initializer in found:
        initializer.CopyFrom(onnx.numpy_helper.from_array(constants[initializer.name].numpy(), initializer.name))
    return _run_session(_open_session(model.SerializeToString(), path, None))


def read_metadata(carried: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """What ``pcenet export`` wrote into a file, all of its entries within bounds, see `pcenet.models.limits`.

    Args:
        carried: the file's texts by key.
        path: the file, for the message.

    Raises:
        ValueError: for the first entry that is missing or breaks its rule.
    """
    if METADATA not in carried:
        raise ValueError(f"{path}: it does not carry what pcenet export writes into a file; export it anew")
    try:
        metadata = read_json(carried[METADATA])
        check_count = check_pixel_classes if check_task(metadata["task"]) == "segment" else check_num_classes
        check_class_names(metadata["class_names"], check_count(metadata["num_classes"]))
        check_image_shape(metadata["input_size"])
        architecture = metadata["preprocessing"]["architecture"]
        if not isinstance(architecture, str):
            raise ValueError(f"architecture {excerpt(architecture)} must be a text")
        metadata["preprocessing"] = check_preprocessing(metadata["preprocessing"]) | {"architecture": architecture}
        multiple, names = metadata["size_multiple"], metadata["outputs"]
        if multiple is not None and not is_whole(multiple, 1, LARGEST_SIDE):
            raise ValueError(
                f"size_multiple {excerpt(multiple)} must be a whole number from 1 to {LARGEST_SIDE}, or null"
            )
        if not isinstance(names, list) or names[:1] != ["logits"] or not all(isinstance(name, str) for name in names):
            raise ValueError(f"outputs {excerpt(names)} must be names, logits first")
        check_grey_range(metadata.get("grey_range"))
        if metadata.get("mask_values") is not None:
            check_mask_values(metadata["mask_values"], [], metadata["num_classes"])
        if not isinstance(metadata["fixed_batch"], bool):
            raise ValueError(f"fixed_batch {excerpt(metadata['fixed_batch'])} must be true or false")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: it does not carry what pcenet export writes into a file: {reason}; export it anew"
        ) from error
    return metadata


def _open(path: Path, threads: int | None, trust_code: bool) -> tuple[Runner, Mapping[str, str]]:
    if path.suffix == ".onnx":
        session = _open_session(str(path), path, threads)
        return _run_session(session), session.get_modelmeta().custom_metadata_map
    program, carried = _load_program(path, trust_code)
    return _run_program(program, {}), {METADATA: carried}


def _open_session(content: str | bytes, path: Path, threads: int | None) -> Any:
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = SILENT  # what goes wrong is raised, too
    options.add_session_config_entry("session.use_env_allocators", "1")
    _limit_memory()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, of no common class
        raise ValueError(f"{path}: onnxruntime cannot read it: {error}") from error


@cache
def _limit_memory() -> None:
    """Let onnxruntime take half of the machine's memory at most: a small graph can ask for terabytes."""
    ort = require("onnxruntime")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"max_mem": memory // 2}))


def _run_session(session: Any) -> Runner:
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {"images": x.contiguous().numpy()})]


def _load_program(path: Path, trust_code: bool) -> tuple[torch.export.ExportedProgram, str]:
    if not trust_code:
        raise ValueError(
            f"{path} is a program, and reading it runs the code in it: give --trust-code (trust_code=True in Python) "
            "where you know who made it, else ask for an ONNX file or the model folder"
        )
    extra = {EXTRA: ""}
    try:
        return torch.export.load(str(path), extra_files=extra), extra[EXTRA]
    except Exception as error:  # whatever a damaged archive brings about
        raise ValueError(f"{path}: torch.export cannot read it: {error}") from error


def _run_program(program: torch.export.ExportedProgram, constants: Mapping[str, Tensor]) -> Runner:
    module = program.module()
    with torch.no_grad():
        for name, value in constants.items():
            attrgetter(name)(module).copy_(value)

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
