"""The multiply-adds that an ONNX file does, counted in its graph while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pcenet.exporting.files import require


@dataclass(frozen=True)
class GraphCount:
    """Multiply-adds of one run.

    Attributes:
        total: all of them.
        by_operator: those of each kind of node.
    """

    total: int
    by_operator: dict[str, int]


def count_multiply_adds(path: str | Path, images: Tensor) -> GraphCount:
    """Count the multiply-adds of an ONNX file on images ``[B, C, H, W]``, as they are routed.

    Convolutions, transposed ones and matrix products are counted by the shapes that they meet when the file runs; the
    shapes depend on the routing, an expert without patches counting nothing.
    """
    onnx, ort = require("onnx"), require("onnxruntime")
    model = onnx.load(str(path))
    counted = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")]
    wanted = sorted({name for node in counted for name in (*node.input[:2], node.output[0])})
    del model.graph.output[:]
    for name in wanted:
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"shape of {name}"]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(f"shape of {name}", onnx.TensorProto.INT64, [None])
        )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    shapes = {name: [int(size) for size in shape] for name, shape in zip(wanted, found, strict=True)}
    by_operator: dict[str, int] = {}
    for node in counted:
        first, second, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        by_operator[node.op_type] = by_operator.get(node.op_type, 0) + _multiply_adds(node, first, second, out)
    return GraphCount(sum(by_operator.values()), by_operator)


def _multiply_adds(node: Any, first: list[int], second: list[int], out: list[int]) -> int:
    if node.op_type == "Conv":  # its weight is [C_out, C_in / groups, ...]
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # [C_in, C_out / groups, ...]
        return math.prod(first) * math.prod(second[1:])
    transposed = node.op_type == "Gemm" and any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])
