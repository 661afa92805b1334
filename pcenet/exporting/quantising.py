"""An ONNX file with int8 weights, and what that costs in accuracy."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcenet.choices import Part
from pcenet.exporting.files import METADATA, ExportedNet, require
from pcenet.runs.config import EvalConfig
from pcenet.tasks.evaluation import Trained, eval_batch_size, open_trained


@dataclass(frozen=True)
class Int8:
    """What the int8 weights did.

    Attributes:
        data, split: on what was measured.
        score: what: ``top1`` or ``miou``, as a share.
        before: that of the float32 file.
        after: that of the int8 file.
    """

    data: str
    split: str
    score: str
    before: float
    after: float


def quantise(path: Path, run: str, data: str, split: Part, threads: int | None) -> Int8:
    """Give a file int8 weights where matrices are multiplied, in place; it carries what `Int8` says.

    onnxruntime's dynamic quantisation: weights by output channel, activations by their range at the time. Routers,
    which compare numbers, stay float32, and so do convolutions of the dense part and by Winograd's algorithm, for which
    onnxruntime has nothing quick.

    Args:
        path: an ONNX file that was compared with its network.
        run: what it was made from.
        data: images with labels, or masks.
        split: which part of them.
        threads: of onnxruntime.
    """
    onnx, quantisation = require("onnx"), require("onnxruntime.quantization")
    trained = open_trained(EvalConfig(run=run, data=data, split=split))
    before, score = _measure(path, trained, threads)
    model = onnx.load(str(path))
    deep = {each.name for each in model.graph.initializer if len(each.dims) > 2}
    excluded = [node.name for node in model.graph.node if _of_router(node) or not deep.isdisjoint(node.input)]
    quantised = path.with_name(f"{path.stem}.int8{path.suffix}")
    root = logging.getLogger()
    root.addFilter(_other_than_advice)
    try:
        quantisation.quantize_dynamic(
            model,
            str(quantised),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # It makes a MatMul of each Gemm before it looks at their names.
            nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
        )
        after, _ = _measure(quantised, trained, threads)
        result = Int8(data, split, score, before, after)
        model = onnx.load(str(quantised))
        carried = next(entry for entry in model.metadata_props if entry.key == METADATA)
        carried.value = json.dumps(json.loads(carried.value) | {"int8": asdict(result)})
        onnx.save(model, str(path))
    finally:
        root.removeFilter(_other_than_advice)
        quantised.unlink(missing_ok=True)
    return result


def _of_router(node: Any) -> bool:
    """Whether a router computes a node: torch's exporter notes the modules that it lies in."""
    names = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    return any(name.split(".")[-1] == "router" for name in re.findall(r"'([^']*)'", names))


def _other_than_advice(record: logging.LogRecord) -> bool:
    """onnxruntime advises, for every file, to run its own optimisation before; ours has nothing for it to do."""
    return not record.getMessage().startswith("Please consider to run pre-processing before quantization.")


def _measure(path: Path, trained: Trained, threads: int | None) -> tuple[float, str]:
    """The score of a file, and its name."""
    model = ExportedNet(path, threads)
    batches = trained.task.eval_loader(model, trained.source, batch_size=eval_batch_size(model), workers=0)
    result = trained.task.evaluate(model, batches, trained.source.classes, device=torch.device("cpu"), precision="fp32")
    score = "top1" if model.task == "classify" else "miou"
    return float(getattr(result, score)), score
