"""The evaluation form of a network: the same modules, made to be run and no longer trained.

What does not depend on the images is computed once: normalisations of the dense part are folded into the convolutions
before them, and what experts share is summed into their kernels.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcenet.exporting.lowering import Lowering
from pcenet.nn import routers_of
from pcenet.nn.stacked import SharedConv2d, StackedConv2d
from pcenet.ops.library import lowering

_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default)


def evaluation_form(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of a network in evaluation form, equal to it within rounding.

    Args:
        model: any network, with or without PCE layers, in float32; it is left as it is.
        example: images ``[B, C, H, W]`` of a size that it takes. The network is run on them, to see which batch
            normalisations of its dense part can be folded; None leaves those as they are.

    Raises:
        ValueError: for a router that drops patches at evaluation.
    """
    form = copy.deepcopy(model).eval().requires_grad_(False)
    for _, router in routers_of(form):
        if router.eval_capacity_factor is not None:
            raise ValueError(
                f"eval_capacity_factor={router.eval_capacity_factor}: a network in evaluation form drops nothing; load "
                "it with eval_capacity_factor=None"
            )
    for name, module in list(form.named_modules()):
        if isinstance(module, SharedConv2d):
            _put(form, name, _summed(module))
    if example is not None:
        fold_batch_norms(form, example)
    return form


@torch.no_grad()
def _summed(conv: SharedConv2d) -> StackedConv2d:
    """The sums of what experts share and their differences."""
    kernels = conv().detach()
    num_experts, out_channels, in_channels, kernel_size, _ = kernels.shape
    stacked = StackedConv2d(num_experts, in_channels, out_channels, kernel_size)
    stacked.weight = nn.Parameter(kernels.clone(), requires_grad=False)
    return stacked.eval()


def _put(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The network with a module under a name; the module itself for the name of the whole."""
    if not name:
        return module
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
    return root


def trace(
    form: nn.Module, example: Tensor, dynamic_shapes: Mapping[int, Any], *, opaque: bool = False
) -> torch.export.ExportedProgram:
    """A network in evaluation form as a graph, for `torch.export.save` or an exporter.

    Args:
        form: the network.
        example: images ``[B, C, H, W]``.
        dynamic_shapes: the axes of the images whose size is left open, as for `torch.export.export`.
        opaque: see `Lowering`; without it the graph holds torch's operators alone.
    """
    with lowering(Lowering(opaque)):
        return torch.export.export(form, (example,), dynamic_shapes=(dict(dynamic_shapes),), strict=False)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> int:
    """Fold batch normalisations into the convolutions whose output they alone read, in place.

    What reads what is seen while the network runs, not guessed from names or classes: any network will do.

    Args:
        model: in evaluation mode.
        example: images that it takes.

    Returns:
        How many were folded.
    """
    with _Watch() as watch:
        outputs = model(example)
    paths = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False)}
    given_out = {id(tensor) for tensor in tree_leaves(outputs)}
    folded = 0
    for norm_weight, read in watch.norms:
        made = watch.convolved.get(id(read))
        once = (read, made, norm_weight)
        if made is None or id(read) in given_out or any(watch.reads[id(tensor)] != 1 for tensor in once):
            continue
        if id(made) not in paths or id(norm_weight) not in paths:
            continue  # a weight that is computed
        convolution, norm = model.get_submodule(paths[id(made)]), model.get_submodule(paths[id(norm_weight)])
        remainder = _after_folding(norm)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and remainder is not None:
            _fold(convolution, norm)
            _put(model, paths[id(norm_weight)], remainder)
            folded += 1
    return folded


class _Watch(TorchDispatchMode):
    """Notes which operators read which tensors.

    Attributes:
        reads: how many operators read a tensor, by its identity.
        convolved: the weight of the convolution that made a tensor, by the tensor's identity.
        norms: weight and input of each batch normalisation that has a weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()
        self.convolved: dict[int, Tensor] = {}
        self.norms: list[tuple[Tensor, Tensor]] = []
        self._alive: list[Any] = []  # an identity is one tensor's for as long as that lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive.append((args, out))
        self.reads.update(id(tensor) for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
        if func is torch.ops.aten.convolution.default and not args[6]:  # not transposed
            self.convolved[id(out)] = args[1]
        elif func in _NORMS and args[1] is not None:
            self.norms.append((args[1], args[0]))
        return out


def _after_folding(norm: nn.Module) -> nn.Module | None:
    """What is left of a normalisation that is folded; None for one that cannot be."""
    if getattr(norm, "running_mean", None) is None:  # it normalises by its batch, at evaluation, too
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm) is BatchNormAct2d:
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Folded in double precision, so that what is rounded is the result alone."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    bias, dtype = convolution.bias, convolution.weight.dtype
    folded = fuse_conv_bn_weights(
        convolution.weight.detach().double(),
        None if bias is None else bias.detach().double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        norm.weight.detach().double(),
        norm.bias.detach().double(),
    )
    convolution.weight, convolution.bias = (nn.Parameter(part.to(dtype), requires_grad=False) for part in folded)
