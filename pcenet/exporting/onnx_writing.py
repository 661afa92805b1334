"""A network in evaluation form as an ONNX graph, by PyTorch's exporter.

What the exporter does not know, or writes with more nodes than are needed, is written here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn

from pcenet.exporting.evaluation import evaluation_form, trace

OPSET = 20  # the first with Gelu


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | Path,
    *,
    output_names: Sequence[str] = ("output",),
    dynamic_batch: bool = True,
) -> None:
    """Write a network of your own, with PCE layers among its parts, as an ONNX file of what it computes at evaluation.

    What `torch.onnx.export` does alone, it cannot do with PCE layers. For networks of this package there is ``pcenet
    export``, which compares the file with the network, too.

    Args:
        model: a network of one input whose output is a tensor, or several; in float32, on the processor. It is left as
            it is.
        images: its input ``[B, C, H, W]``, for the size and, where that is fixed, the batch.
        path: the file; one that is there is replaced.
        output_names: of its outputs, in their order. The input is called ``images``.
        dynamic_batch: whether the file takes any number of images.

    Raises:
        ValueError: for a router that drops patches at evaluation.
    """
    form = evaluation_form(model, images)
    shapes: dict[int, Any] = {}
    if dynamic_batch:  # what is 1 in the example would be taken for always 1
        images, shapes = torch.cat((images, images)), {0: torch.export.Dim("batch")}
    graph = to_onnx(form, images, dynamic_shapes=shapes, output_names=output_names, metadata={})
    ir.save(graph, path)


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
    program = torch.onnx.export(
        trace(form, example, dynamic_shapes, opaque=True),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=list(output_names),
        custom_translation_table=_TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    model = program.model
    # Kernels and positions are made by nodes of the graph, which are computed here; those of many outputs cannot be.
    fold_constants(model, output_size_limit=sys.maxsize, should_fold=lambda node: node.op_type != "Split")
    remove_unused_nodes(model)
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
    kernels: Sequence[Any],
    shifts: Sequence[Any],
    transforms: Sequence[Any],
) -> Any:
    """`pcenet.exporting.lowering.convolve_tiles`."""
    axis, shared, width = (1 if transforms else 0), len(kernels) == 1, kernels[0].shape[-1]
    own = [reads] if shared else op.Split(reads, counts, axis=axis, num_outputs=len(kernels))
    zeros = np.zeros((transforms[1].shape[0], 1, width) if transforms else (1, width), np.float32)
    parts: list[Any] = [op.Constant(value=ir.serde.serialize_tensor(ir.tensor(zeros)))]
    for expert, (index, kernel) in enumerate(zip(own, kernels, strict=True)):
        windows = op.Gather(rows, index, axis=0)
        if transforms:
            (read, write), (cells, channels, _) = transforms, kernel.shape
            inputs = op.MatMul(read, op.Reshape(windows, _shape(cells, -1)))
            products = op.MatMul(op.Reshape(inputs, _shape(cells, -1, channels)), kernel)
            out = op.MatMul(write, op.Reshape(products, _shape(cells, -1)))
            out = op.Reshape(out, _shape(write.shape[0], -1, width))
        else:
            out = op.Gemm(op.Reshape(windows, _shape(-1, kernel.shape[0])), kernel, *shifts[expert : expert + 1])
        parts.append(out)
    joined: Any = op.Concat(*parts, axis=axis)
    return op.Reshape(joined, _shape(-1, width)) if transforms else joined


def _shape(*sizes: int) -> Any:
    return op.Constant(value_ints=list(sizes))


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _sort,
    torch.ops.pcenet_export.convolve_tiles.default: _convolve_tiles,
}
