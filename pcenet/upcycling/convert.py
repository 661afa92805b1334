"""Convolutions of a trained network become PCE convolutions that compute the same.

Nothing is converted wrongly: what cannot be replaced is left alone, and the converted network is run and compared with
what it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from pcenet.choices import did_you_mean
from pcenet.nn import PCEConv2d, Router
from pcenet.nn.checks import check_at_least, check_choice, is_number
from pcenet.nn.conv import ROUTER_DEFAULTS
from pcenet.nn.routing import Gate
from pcenet.nn.stacked import SharedConv2d
from pcenet.upcycling.record import Converted, Upcycling
from pcenet.upcycling.survey import Found, make_example, run, survey, tensors_of

Freeze = Literal["dense", "pretrained"]
Model = TypeVar("Model", bound=nn.Module)

DEPTH = 0.5
SMALLEST_PATCH = 2  # by default, of the finest map
TOLERANCE = 1e-3  # of the largest output: what is wrong is off by far more, what is rounded differently by far less
_OF_THE_LAYER = ("in_channels", "patch_size", "num_experts")
_ROUTER_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(Router).parameters.items()
    if name not in _OF_THE_LAYER
} | ROUTER_DEFAULTS


def upcycle(
    model: Model,
    *,
    layers: float | str | Sequence[str] | None = None,
    num_experts: int = 4,
    patch_size: int | None = None,
    gate: Gate = "straight_through",
    perturbation: float = 0.0,
    freeze: Freeze | None = None,
    shared_kernel: bool = True,
    example: Any = None,
    **router_options: Any,
) -> Model:
    """Turn 3x3 convolutions of a trained network into `pcenet.nn.PCEConv2d` whose experts start as copies of them.

    Under the default gate the network then computes what it did before, at any image size, in training too. Experts
    part when it is trained, because they see different patches; add `pcenet.nn.aux_loss` of its `record_routing` to the
    loss. Normalisation, activation and all other convolutions stay as they are. Convolutions that are children of one
    module, such as a residual block, and see maps of one size share the router of the first; the others have their own.

    The network is tried on an example to learn which convolutions run, when, and on which maps, and run once more to
    see that it still computes the same. What cannot be converted is left alone: strides, groups, dilation, subclasses
    of ``Conv2d``, parametrised weights, modules or weights that are used more than once, and `PCEConv2d` itself, so
    that a second call with the same arguments changes nothing; one with other ``layers`` adds them.

    Args:
        model: any network; it is changed in place.
        layers: which convolutions: a share of the depth, counted from the end in blocks of one router; or names and
            patterns, such as ``"layer4"`` (all below it) or ``["layer3.*", "layer4.1.conv2"]``. None: the deeper half.
        num_experts: E.
        patch_size: patch side in pixels of the finest map that is converted. On a map with half the side it is half as
            large, so that patches shrink with depth and cover the same part of the image; where a patch would be no
            whole number of pixels, the convolution is left alone. None: one pixel of the coarsest map, and at least 2
            of the finest; in a second call the scale of the first.
        gate: ``"straight_through"`` or ``"prob"``, under which the network does not start as what it was.
        perturbation: standard deviation of noise on each expert's kernel, by that of its values; 0: all start equal.
        freeze: ``"dense"`` trains routers and experts alone, ``"pretrained"`` of these only what is new: routers and
            the experts' differences from the pretrained kernel, which needs ``shared_kernel``. In training mode frozen
            batch normalisation still follows its batches, as everywhere in torch, until ``eval()`` is called on it
            (``pcenet train`` does). Thaw a fresh classifier by ``requires_grad_(True)``.
        shared_kernel: store the pretrained kernel once, trained by all patches, and each expert as its difference from
            it, at first 0, to which weight decay draws it; False: E copies that have nothing in common.
        example: the argument of the network's forward pass, or a tuple of all of them. None: one image of noise of the
            size that its ``pretrained_cfg`` names, else of 224 px. It decides nothing but which convolutions run, and
            how their maps' sizes compare.
        router_options: those of `pcenet.nn.Router`, such as ``balancing`` or ``num_bands``. Nothing is ever dropped, so
            ``capacity_factor`` is not among them.

    Returns:
        The network. Its attribute ``upcycling``, an `Upcycling`, says what was converted and what was left alone;
        ``print(model.upcycling)``.

    Raises:
        ValueError: where an argument breaks its rule; if there is nothing to convert, saying why; for an example that
            the network does not take; for a network that was upcycled with other options, and for a
            `pcenet.models.TimmNet`, which has a method for it.
        TypeError: for an option that `pcenet.nn.Router` does not have.
    """
    options = _checked_options(num_experts, gate, shared_kernel, router_options)
    if isinstance(getattr(type(model), "upcycling", None), property):  # it keeps the record itself
        raise ValueError(
            f"model: a {type(model).__name__} is upcycled by its own method, model.upcycle(...), so that it can be "
            "saved"
        )
    before = getattr(model, "upcycling", None)
    if isinstance(before, Upcycling) and dict(before.options) != options:
        raise ValueError(
            f"model was upcycled with {dict(before.options)}, and all of its layers have the same options; give those, "
            "or a network that is not upcycled"
        )
    if freeze is not None:
        check_choice("freeze", freeze, get_args(Freeze))
    if freeze == "pretrained" and not shared_kernel:
        raise ValueError("freeze='pretrained' needs shared_kernel=True, which keeps apart what was pretrained")
    if patch_size is not None:
        check_at_least(1, patch_size=patch_size)
    if not is_number(perturbation) or not 0 <= perturbation < math.inf:
        raise ValueError(f"perturbation={perturbation!r} must be a number, and at least 0")
    arguments = make_example(model, example)
    found, output = survey(model, arguments)
    chosen, chosen_by = _choose(found, layers)
    left = {entry.name: entry.reason or "not among the layers that were chosen" for entry in found}
    sizes = {layer.name: layer.patch_size for layer in before.converted} if isinstance(before, Upcycling) else {}
    there = [(max(entry.map_size), sizes[entry.name]) for entry in found if entry.name in sizes]
    plan, too_small = _plan(chosen, patch_size, there)
    same = gate == "straight_through" and perturbation == 0
    work = _Work(model, options, perturbation, arguments, output if same else None)
    done, broken = work.convert(plan)
    left |= too_small | broken
    for layer in done:
        del left[layer.name]
    record = Upcycling(done, left, options, chosen_by)
    if isinstance(before, Upcycling):
        record = before.and_then(record, [entry.name for entry in found])
    if not done and not any(entry.converted for entry in found):
        raise ValueError(f"no convolution can be converted: {record.why_left() or 'the network has no 3x3 one'}")
    if freeze is not None:
        _freeze(model, freeze)
    model.upcycling = record  # type: ignore[assignment]
    return model


def rebuild(model: Model, record: Upcycling) -> Model:
    """Convert the same layers as before, without looking at weights or running anything: for loading them.

    Args:
        model: the network as it was before; it is changed in place.
        record: what was done.

    Raises:
        ValueError: where a layer does not exist, or cannot be converted.
    """
    groups: dict[str, list[Converted]] = {}
    for layer in record.converted:
        groups.setdefault(layer.leader or layer.name, []).append(layer)
    for group in groups.values():
        _replace(model, group, record.options, 0.0)
    model.upcycling = record  # type: ignore[assignment]
    return model


def _checked_options(
    num_experts: int, gate: Gate, shared_kernel: bool, router_options: dict[str, Any]
) -> dict[str, Any]:
    """Every option of the layers, defaults included, so that a later change of defaults changes no saved network."""
    for name in ("capacity_factor", "eval_capacity_factor"):
        if router_options.get(name) is not None:
            raise ValueError(
                f"{name}={router_options[name]}: no patch may be dropped, since there is no shortcut to carry it; "
                "leave it out"
            )
    unknown = sorted(router_options.keys() - _ROUTER_OPTIONS.keys())
    if unknown:
        raise TypeError(f"upcycle got unexpected options {unknown}; a router takes {', '.join(_ROUTER_OPTIONS)}")
    own = {"num_experts": num_experts, "shared_kernel": shared_kernel}
    options = own | _ROUTER_OPTIONS | router_options | {"gate": gate}
    PCEConv2d(1, 1, patch_size=1, **options)  # it checks them
    return options


def _choose(found: list[Found], layers: float | str | Sequence[str] | None) -> tuple[list[list[Found]], str]:
    """The convolutions to convert, in groups of one router, and in words how they were chosen."""
    if layers is None or isinstance(layers, int | float):
        share = DEPTH if layers is None else layers
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"layers={layers} must be a share of the depth, above 0 and at most 1, or names")
        # What has been converted before keeps its place in the depth.
        groups = _grouped([entry for entry in found if entry.reason is None or entry.converted])
        chosen = groups[len(groups) - math.ceil(share * len(groups)) :]
        return [group for group in chosen if not group[0].converted], f"the deepest {share:.0%} of the blocks"
    patterns = [layers] if isinstance(layers, str) else list(layers)
    names = [entry.name for entry in found]
    wanted: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not hits:
            raise ValueError(f"layers: {pattern!r} is no 3x3 convolution of the network{did_you_mean(pattern, names)}")
        wanted |= set(hits)
    fitting = [entry for entry in found if entry.reason is None and entry.name in wanted]
    return _grouped(fitting), f"by name ({', '.join(patterns)})"


def _grouped(entries: list[Found]) -> list[list[Found]]:
    """Convolutions in the order in which they run; those that may share a router together."""
    groups: dict[Any, list[Found]] = {}
    for entry in entries:
        sizes = (entry.map_size, entry.other_map_size)
        key = entry.name if entry.block is None else (entry.block, *sizes, entry.converted)
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def _plan(
    groups: list[list[Found]], patch_size: int | None, there: Sequence[tuple[int, int]]
) -> tuple[list[list[Converted]], dict[str, str]]:
    """Patch sizes by the sizes of the maps, and what is left alone because a patch would be too small.

    Args:
        groups: what is to be converted.
        patch_size: of the finest map; None: by the sizes of the maps, or by what was converted before.
        there: sides of the maps and patches of what was converted before, whose scale goes on.
    """
    sides = [max(group[0].map_size) for group in groups]
    if not sides:
        return [], {}
    finest, coarsest = max([*sides, *(side for side, _ in there)]), min(sides)
    # Maps are halved upwards: 7 follows 13, so that their ratio is rounded to a power of two.
    halvings = [round(math.log2(finest / side)) for side in sides]
    size = max(SMALLEST_PATCH, 2 ** round(math.log2(finest / coarsest))) if patch_size is None else patch_size
    if there:
        side, own = there[0]
        size = own << round(math.log2(finest / side))
        if patch_size not in (None, size):
            raise ValueError(
                f"patch_size={patch_size}: the patches of the layers that were converted before are as large as {size} "
                "pixels of the finest map; give that, or leave it out"
            )
    plan: list[list[Converted]] = []
    left: dict[str, str] = {}
    for group, times in zip(groups, halvings, strict=True):
        own = size >> times
        if not own or size % 2**times:
            reason = f"its map has 1/{2**times} of the finest one's side, and patches would have {size / 2**times:g} px"
            left |= {entry.name: reason for entry in group}
            continue
        leader = group[0].name
        plan.append(
            [Converted(entry.name, own, None if entry.name == leader else leader, entry.map_size) for entry in group]
        )
    return plan, left


@dataclass
class _Work:
    """Converting groups of layers, and seeing that the network is still the same.

    Attributes:
        model: the network.
        options: of every layer.
        perturbation: of every expert.
        example: arguments of a forward pass.
        output: what it gave; None where it will be another.
    """

    model: nn.Module
    options: Mapping[str, Any]
    perturbation: float
    example: tuple[Any, ...]
    output: Any = field(repr=False)

    def convert(self, plan: list[list[Converted]]) -> tuple[tuple[Converted, ...], dict[str, str]]:
        """Convert all groups, or, where that breaks the network, what does not: groups, or single layers of them.

        Returns:
            What was converted; and by name what was not, and why.
        """
        undo = [self._convert(group) for group in plan]
        if self._fault() is None:
            return tuple(layer for group in plan for layer in group), {}
        for replaced in undo:
            self._restore(replaced)
        if fault := self._fault():  # not even before: it cannot be told whether the same comes out
            raise ValueError(f"the network gives another output each time ({fault}), and cannot be checked")
        done: list[Converted] = []
        left: dict[str, str] = {}
        for group in plan:
            if self._attempt(group) is None:
                done += group
                continue
            for layer in group:
                alone = replace(layer, leader=None)
                if fault := self._attempt([alone]):
                    left[layer.name] = f"without it the network is not the same: {fault}"
                else:
                    done.append(alone)
        return tuple(done), left

    def _attempt(self, group: list[Converted]) -> str | None:
        """Convert a group; where that is wrong, undo it and return what is."""
        originals = self._convert(group)
        if fault := self._fault():
            self._restore(originals)
            return fault
        return None

    def _convert(self, group: list[Converted]) -> dict[str, nn.Module]:
        return _replace(self.model, group, self.options, self.perturbation)

    def _restore(self, originals: dict[str, nn.Module]) -> None:
        for name, module in originals.items():
            _put(self.model, name, module)

    def _fault(self) -> str | None:
        """What is wrong with the network's output, if anything."""
        try:
            output = run(self.model, self.example)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if self.output is None:
            return None
        now, then = tensors_of(output), tensors_of(self.output)
        if [tensor.shape for tensor in now] != [tensor.shape for tensor in then]:
            return "its outputs have other shapes"
        for ours, theirs in zip(now, then, strict=True):
            if theirs.is_floating_point() and theirs.numel():
                off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
                limit = TOLERANCE if theirs.dtype in (torch.float32, torch.float64) else 50 * TOLERANCE
                if not off <= limit:
                    return f"its output is off by {off:.1e} of its largest value"
        return None


def _replace(
    model: nn.Module, group: list[Converted], options: Mapping[str, Any], perturbation: float
) -> dict[str, nn.Module]:
    """Convert layers of one router; returns what stood there."""
    originals: dict[str, nn.Module] = {}
    leader: PCEConv2d | None = None
    for layer in group:
        try:
            conv = model.get_submodule(layer.name)
        except AttributeError as error:
            raise ValueError(f"the network has no layer {layer.name}") from error
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"layer {layer.name} is a {type(conv).__name__}, not a convolution")
        own = dict(options)
        if leader is not None:
            own = {name: value for name, value in options.items() if name not in _ROUTER_OPTIONS} | {"router": leader}
        pce = PCEConv2d.from_conv2d(conv, patch_size=layer.patch_size, perturbation=perturbation, **own)
        leader = leader or pce
        originals[layer.name] = conv
        _put(model, layer.name, pce)
    return originals


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _freeze(model: nn.Module, what: Freeze) -> None:
    """Leave only what is named in `upcycle` to train."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PCEConv2d):
            module.requires_grad_(True)
            if what == "pretrained":
                if isinstance(module.kernels, SharedConv2d):
                    module.kernels.shared.requires_grad_(False)
                if module.bias is not None:
                    module.bias.requires_grad_(False)
