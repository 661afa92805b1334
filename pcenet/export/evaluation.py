"""The evaluation form of a network: the same function, made to be run and no longer trained.

Normalisations are folded into the convolutions before them, what experts share is summed into their kernels, nothing is
dropped, and every patch runs through its own experts alone, in operators that exporters know.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcenet.export.layers import FixedConv2d, FixedLayer
from pcenet.models.blocks import ResidualBlock
from pcenet.nn import PCEConv2d, PCELayer, record_routing
from pcenet.nn.conv import leaders_of

_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default)


def evaluation_form(model: nn.Module, example: Tensor | None = None, *, same_shape: bool = False) -> nn.Module:
    """A copy of a network in evaluation form, equal to it within rounding.

    Args:
        model: any network, with or without PCE layers, in float32; it is left as it is.
        example: images ``[B, C, H, W]`` of a size that it takes. The network is run on them, to see which batch
            normalisations of its dense part can be folded; None leaves those as they are.
        same_shape: whether all images will come in the example's shape: experts with few patches then convolve pixel by
            pixel, which is quicker than Winograd's algorithm for few.

    Raises:
        ValueError: for a router that drops patches at evaluation; for ``same_shape`` without an example.
    """
    if same_shape and example is None:
        raise ValueError("same_shape=True needs an example, whose shape it is")
    form = copy.deepcopy(model).eval().requires_grad_(False)
    convolutions: dict[PCEConv2d, FixedConv2d] = {}
    leaders = leaders_of(form)
    patches: defaultdict[str, float] = defaultdict(lambda: math.inf)
    if same_shape and example is not None:
        patches |= _patches_by_expert(form, example)
    for name, module in list(form.named_modules()):
        if isinstance(module, PCELayer):
            parent = form.get_submodule(name.rpartition(".")[0]) if name else None
            if isinstance(parent, ResidualBlock):
                form = _put(form, name.rpartition(".")[0], FixedLayer(module, name, patches[name], residual=True))
            else:
                form = _put(form, name, FixedLayer(module, name, patches[name]))
        elif isinstance(module, PCEConv2d):
            leader = convolutions[leaders[module]] if module in leaders else None
            own = patches[name if leader is None else leader.name]
            convolutions[module] = FixedConv2d(module, name, own, leader)
            form = _put(form, name, convolutions[module])
    if example is not None:
        fold_batch_norms(form, example)
    return form


@torch.no_grad()
def _patches_by_expert(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Under each layer's name how many patches of these images one of its experts serves on average, in the largest of
    its passes."""
    with record_routing(model) as records:
        model(images)
    return {
        name: max(float(routing.load.float().mean()) for routing in routings)
        for name, routings in records.items()
        if routings
    }


def _put(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The network with a module under a name; the module itself for the name of the whole."""
    if not name:
        return module
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
    return root


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
    """What is left of a normalisation that is folded; None for one of an unknown kind."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm) is BatchNormAct2d:
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight, dtype = convolution.weight.double(), convolution.weight.dtype
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if convolution.bias is not None:
        bias = convolution.bias.double()
    bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    convolution.weight = nn.Parameter((weight * scale[:, None, None, None]).to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
