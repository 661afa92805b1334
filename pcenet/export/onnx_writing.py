"""A network in evaluation form as an ONNX graph, by PyTorch's exporter.

What the exporter does not know, or writes with more nodes than are needed, is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from pcenet.export.convolving import TileConv

OPSET = 20  # the first with Gelu


def to_onnx(
    form: nn.Module,
    example: Tensor,
    *,
    dynamic_shapes: Mapping[int, Any],
    output_names: Sequence[str],
    metadata: Mapping[str, str],
) -> ir.Model:
    """Trace a network and write it as an ONNX graph whose input is ``images``.

    Args:
        form: as `evaluation_form` makes it; its outputs are tensors.
        example: images ``[B, C, H, W]``.
        dynamic_shapes: the axes of the images whose size is left open, as for `torch.export.export`.
        output_names: of its outputs, in their order.
        metadata: texts that the file carries.
    """
    for module in form.modules():
        if isinstance(module, TileConv):
            module.opaque = True
    program = torch.onnx.export(
        form,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=list(output_names),
        dynamic_shapes=(dict(dynamic_shapes),),
        custom_translation_table=_TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    model = program.model
    for node in model.graph:
        # An operator's outputs have to be numbered while it is written; afterwards their sizes say how many there are.
        if node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)
    model.metadata_props.update(metadata)
    return model


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort in one axis: of equals TopK takes the first one first."""
    return op.TopK(x, op.Shape(x), axis=0, largest=int(descending), sorted=1)


def _convolve_tiles(
    rows: Any,
    reads: Any,
    counts: Any,
    owners: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    transforms: Sequence[Any],
) -> Any:
    """`pcenet.export.convolving.convolve_tiles`."""
    axis, width = (1 if transforms else 0), weights[0].shape[-1]
    own = [reads] if len(weights) == 1 else op.Split(reads, counts, axis=axis, num_outputs=len(weights))
    windows = [op.Gather(rows, index, axis=0) for index in own]
    if not transforms:
        parts = [
            op.Gemm(op.Reshape(each, _shape(-1, weight.shape[0])), weight, bias)
            for each, weight, bias in zip(windows, weights, biases, strict=True)
        ]
        return op.Concat(_zeros(1, width), *parts, axis=0)
    (read, write), (cells, channels, _) = transforms, weights[0].shape
    parts = [_zeros(write.shape[0], width)]
    for each, weight in zip(windows, weights, strict=True):
        inputs = op.MatMul(read, op.Reshape(each, _shape(cells, -1)))
        products = op.MatMul(op.Reshape(inputs, _shape(cells, -1, channels)), weight)
        parts.append(op.MatMul(write, op.Reshape(products, _shape(cells, -1))))
    joined = op.Reshape(op.Concat(*parts, axis=1), _shape(write.shape[0], -1, width))
    return op.Reshape(op.Add(joined, op.Gather(biases[0], owners, axis=0)), _shape(-1, width))


def _zeros(*sizes: int) -> Any:
    return op.Constant(value=ir.serde.serialize_tensor(ir.tensor(np.zeros(sizes, np.float32))))


def _shape(*sizes: int) -> Any:
    return op.Constant(value_ints=list(sizes))


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _sort,
    torch.ops.pcenet.convolve_tiles.default: _convolve_tiles,
}
