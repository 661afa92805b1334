"""What is recorded of the package's behaviour: `record.py` writes it down, `test_golden.py` compares.

All numbers are exact fractions that every machine draws alike, weights and buffers by their own names: neither the
order in which a network makes its parts nor how it initialises them matters. Everything runs in float64, where two
implementations that sum in another order were seen to differ by up to 1e-12, at routings that no rounding can change.
The patches of every map divide it: what a padded patch reads beyond the map is not recorded under ``border="zero"`` and
``"halo"``, only under ``"exchange"`` and of `PCEConv2d`, where it is zeros.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import pcenet
from pcenet.catalogue import bundled
from pcenet.models import create_network, load_model
from pcenet.models.hub import SavableModel
from pcenet.nn import PCEConv2d, PCELayer, Routing, aux_loss, record_routing

HERE = Path(__file__).parent
SAVED = HERE / "saved"
# Implementations differ by rounding. A patch whose two best experts lie closer than this could change its own.
SMALLEST_MARGIN = 1e-6
SMALLEST_MARGIN_FLOAT32 = 1e-4


@dataclass
class Recorded:
    """What a recipe gives.

    Attributes:
        plain: what must be equal, of types that JSON knows.
        tensors: by group and name, what must be equal up to rounding.
    """

    tensors: dict[str, dict[str, Tensor]]
    plain: dict[str, Any] = field(default_factory=dict)


Recipe = Callable[[], Recorded]


# Numbers


def values(name: str, *shape: int) -> Tensor:
    """Numbers in [-1, 1) that float32 holds exactly, drawn by a name; NumPy promises this generator for ever."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).randint(-(2**23), 2**23, shape, np.int64)
    return torch.from_numpy(np.asarray(numbers / 2**23))


def images(name: str, *shape: int) -> Tensor:
    """Noise that differs between pixels, and more between sixteen parts, so that patches want several experts."""
    coarse = values(f"{name}, coarse", *shape[:2], 4, 4)
    return values(name, *shape) + 4 * F.interpolate(coarse, shape[2:])


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer numbers drawn by its name, of a size that keeps signals near 1."""
    state = model.state_dict()
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        drawn, of_router = values(name, *tensor.shape), ".router." in f".{name}"
        if last == "num_batches_tracked":
            tensor.fill_(3)
        elif last == "centring":
            tensor.fill_(0.25)
        elif last == "running_var" or (last == "weight" and f"{module}.running_var" in state):
            tensor.copy_(1 + 0.5 * drawn)
        elif tensor.ndim < 2 or last in ("running_mean", "bias"):
            tensor.copy_((0.1 if of_router else 0.3) * drawn)
        else:
            if name.endswith("router.logits.weight"):  # what all patches have in common decides nothing
                drawn = drawn - drawn.mean(1, keepdim=True)
            # Stacked kernels have the experts in front; those of a router are larger, so that patches differ to it.
            fan_in = math.prod(tensor.shape[-3:] if tensor.ndim > 3 else tensor.shape[1:])
            gain = 3.0 if of_router else 0.5 if last == "difference" else 1.0
            tensor.copy_(gain * math.sqrt(3 / fan_in) * drawn)
    return model


# What is observed


def margin(routing: Routing) -> float:
    """How far the numbers of a routing may move before a patch gets another expert or another one is dropped."""
    found = [math.inf]
    logits, k = routing.logits.detach(), routing.top_k
    if k < routing.num_experts:
        best = logits.topk(k + 1, dim=1).values
        found.append(float((best[:, k - 1] - best[:, k]).min()))
    if routing.capacity is not None:
        gate = routing.probs.detach().gather(1, routing.expert_ids)
        for expert in range(routing.num_experts):
            queue = gate[routing.expert_ids == expert].sort(descending=True).values
            found += (queue[routing.capacity - 1 : -1] - queue[routing.capacity :])[:1].tolist()
    return min(found)


def check_margins(records: Mapping[str, list[Routing]], smallest: float = SMALLEST_MARGIN) -> None:
    """Fail where rounding might change a routing: what was recorded of it would be worth nothing."""
    for name, routings in records.items():
        for routing in routings:
            assert margin(routing) > smallest, f"the routing of {name} has a margin of {margin(routing)}"


def observe(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Outputs in evaluation and in training; the gradients of a weighting of the latter and of the auxiliary loss; the
    buffers after that step."""
    with torch.no_grad(), record_routing(model.eval()) as records:
        evaluated = model(x)
    x.requires_grad_(True)
    with record_routing(model.train()) as training_records:
        output = model(x)
    check_margins(records)
    check_margins(training_records)
    auxiliary = aux_loss(training_records)
    ((output * values("direction", *output.shape)).sum() + auxiliary).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "outputs": {"evaluation": evaluated, "training": output, "auxiliary loss": auxiliary},
        "gradients": {"input": x.grad, **gradients},
        "statistics": {name: buffer.double() for name, buffer in model.named_buffers()},
    }


# Networks

_CLASSIFIED, _LARGE, _SEGMENTED = (2, 3, 16, 24), (1, 3, 224, 224), (2, 3, 64, 128)
# The smallest images that the patches of every map divide, a height unlike the width where that is possible.
NETWORKS: dict[str, tuple[int, ...]] = {
    "pce_nano": _CLASSIFIED,
    "dense_nano": _CLASSIFIED,
    "dense_nano_wide": _CLASSIFIED,
    "pce_nano_spec": (2, 3, 32, 48),
    "pce_nano_s2": _SEGMENTED,
    "dense_nano_s2": _SEGMENTED,
    "pce_tiny_s2": _SEGMENTED,
    "dense_tiny_s2": _SEGMENTED,
    "pce_unet_nano": _SEGMENTED,
    "dense_unet_nano": _SEGMENTED,
    "dense_unet_nano_wide": _SEGMENTED,
    "pce_unet_tiny": _SEGMENTED,
    "dense_unet_tiny": _SEGMENTED,
    "pce_tiny": _LARGE,
    "pce_tiny_spec": _LARGE,
    "dense_tiny": (1, 3, 64, 96),
    "pce_small": _LARGE,
    "pce_small_spec": _LARGE,
    "dense_small": (1, 3, 64, 96),
}


def network(name: str) -> Recorded:
    """A registered network: its tensors, its configuration, and what it does."""
    model = create_network(name)
    tensors = {key: [str(tensor.dtype), *tensor.shape] for key, tensor in model.state_dict().items()}
    plain = {"tensors": tensors, "config": json.loads(json.dumps(model.config()))}
    return Recorded(observe(fill(model).double(), images("images", *NETWORKS[name])), plain)


# Layers alone


def layer(size: tuple[int, ...] = (2, 6, 8, 12), **options: Any) -> Recorded:
    """A `PCELayer` on a map of 12 patches, unless its options say otherwise."""
    defaults = {"in_channels": 6, "out_channels": 8, "patch_size": 4, "num_experts": 4, "hidden_channels": 5}
    model = fill(PCELayer(**(defaults | options))).double()
    return Recorded(observe(model, images("map 3", *size)))


def convolution(size: tuple[int, ...] = (2, 6, 8, 12), **options: Any) -> Recorded:
    """A `PCEConv2d` and one that follows its router."""
    defaults = {"in_channels": 6, "out_channels": 8, "patch_size": 4, "num_experts": 4}
    leader = PCEConv2d(**(defaults | options))
    follower = PCEConv2d(8, 5, patch_size=leader.patch_size, num_experts=leader.num_experts, router=leader)
    return Recorded(observe(fill(nn.Sequential(leader, follower)).double(), images("map 3", *size)))


def _table(make: Callable[..., Recorded], **options: tuple[Any, ...]) -> dict[str, Recipe]:
    """A recipe for every combination of options, but that ``shared_kernel`` follows from all the others: any six of
    the seven options still meet in every combination."""
    table = {}
    for places in product(*(range(len(choices)) for choices in options.values())):
        chosen = {name: options[name][place] for name, place in zip(options, places, strict=True)}
        chosen["shared_kernel"] = sum(places) % 2 == 0
        if chosen.get("border") == "exchange" and chosen["top_k"] > 1:
            continue
        name = ", ".join(f"{key}={value}" for key, value in chosen.items())
        table[f"{make.__name__}: {name}"] = partial(make, **chosen)
    return table


_ROUTED: dict[str, tuple[Any, ...]] = {
    "gate": ("prob", "straight_through"),
    "gate_input": ("pixels", "flat"),
    "top_k": (1, 2),
    "balancing": ("batch", "none"),
}
_ODD: dict[str, tuple[Any, ...]] = {"gate_input": ("pixels", "flat"), "capacity_factor": (None, 0.5), "top_k": (1,)}
LAYERS: dict[str, Recipe] = {
    **_table(layer, border=("zero", "halo", "exchange"), **_ROUTED, capacity_factor=(None, 1.25, 0.5)),
    **_table(layer, border=("exchange",), size=((2, 6, 7, 10), (3, 6, 5, 3)), **_ODD),
    **_table(convolution, kernel_size=(3, 1), **_ROUTED, capacity_factor=(None, 0.5)),
    **_table(convolution, kernel_size=(3, 1), size=((2, 6, 7, 10), (3, 6, 5, 3)), **_ODD),
}
for _border in ("zero", "halo", "exchange"):
    LAYERS |= {
        f"layer: {_border}, {name}": partial(layer, border=_border, **options)
        for name, options in {
            "as it comes": {},
            "one expert": {"num_experts": 1},
            "more experts than patches": {"num_experts": 20},
            "patches of one pixel": {"patch_size": 1, "size": (1, 6, 3, 4)},
            "patches of two pixels": {"patch_size": 2},
            "one patch": {"patch_size": 8, "size": (1, 6, 8, 8)},
            "no shortcut": {"shortcut": False},
            "equal widths": {"out_channels": 6, "hidden_channels": None},
            "no position": {"num_bands": 0},
            "one band": {"num_bands": 1},
            "narrow router": {"router_hidden": 3},
            "dropping at evaluation": {"eval_capacity_factor": 0.5},
        }.items()
    }
LAYERS |= {
    f"convolution: {name}": partial(convolution, **options)
    for name, options in {
        "no bias": {"bias": False},
        "one expert": {"num_experts": 1},
        "more experts than patches": {"num_experts": 20},
        "patches of one pixel": {"patch_size": 1, "size": (1, 6, 3, 4)},
        "patches of two pixels": {"patch_size": 2},
        "one patch": {"patch_size": 8, "size": (1, 6, 8, 8)},
        "dropping at evaluation": {"eval_capacity_factor": 0.5},
    }.items()
}


# Networks that somebody trained


def pretrained(name: str, dtype: torch.dtype = torch.float64) -> Recorded:
    """The outputs of bundled weights."""
    size = (2, 3, 64, 128) if "unet" in name else (2, 3, 16, 24)
    return _evaluated(load_model(name), images(f"images of {name}", *size), dtype)


def _evaluated(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Recorded:
    with torch.no_grad(), record_routing(model.to(dtype)) as records:
        output = model(x.to(dtype)).double()
    check_margins(records, SMALLEST_MARGIN if dtype == torch.float64 else SMALLEST_MARGIN_FLOAT32)
    return Recorded({"outputs": {"evaluation": output}})


PRETRAINED = {name: partial(pretrained, name) for name in bundled()}


# Converted networks


def upcycled(make: Callable[[], nn.Module], **options: Any) -> Recorded:
    """A converted ResNet-18: what was converted, and what it does once its experts differ."""
    model = pcenet.upcycle(fill(make()).eval(), example=values("example", 1, 3, 64, 64).float(), **options)
    tensors = {key: [str(tensor.dtype), *tensor.shape] for key, tensor in model.state_dict().items()}
    converted = [[layer.name, layer.patch_size, layer.leader] for layer in model.upcycling.converted]
    x = images("images", 2, 3, 64, 64)
    return Recorded(observe(fill(model).double(), x), {"tensors": tensors, "converted": converted})


UPCYCLED = {
    "narrow resnet18, all of it": partial(upcycled, lambda: _narrow_resnet18(), layers=1.0),
    "narrow resnet18, prob, own kernels": partial(
        upcycled, lambda: _narrow_resnet18(), layers=1.0, gate="prob", shared_kernel=False
    ),
    "torchvision resnet18": partial(upcycled, lambda: torchvision.models.resnet18(num_classes=10)),
}


def _narrow_resnet18() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, channels=(8, 12, 16, 24))


# A short training

STEPS = 50


def losses(dtype: torch.dtype) -> list[float]:
    """The losses of a small network in fifty steps on four batches of noise. No patch is near to another expert in any
    of them, so that rounding shifts losses but never makes them jump."""
    model = fill(create_network("pce_nano", widths=(8, 12, 16), num_classes=4)).to(dtype).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    batches = [images(f"batch {index}, 16", 8, 3, 16, 16).to(dtype) for index in range(4)]
    found = []
    for step in range(STEPS):
        optimiser.zero_grad()
        with record_routing(model) as records:
            loss = F.cross_entropy(model(batches[step % 4]), torch.arange(8) % 4) + aux_loss(records)
        check_margins(records, SMALLEST_MARGIN_FLOAT32)
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


# Networks that users have on disk


# Each folder's network, and the images that it is tried on.
_SAVED: dict[str, tuple[Callable[[], SavableModel], tuple[int, ...]]] = {
    "pce_nano": (lambda: create_network("pce_nano", widths=(4, 5, 6), num_classes=3), (2, 3, 16, 24)),
    "two_experts": (
        lambda: create_network("pce_nano", widths=(4, 6, 8), num_classes=3, num_experts=3, top_k=2, border="halo"),
        (2, 3, 16, 24),
    ),
    "pce_unet_nano": (lambda: create_network("pce_unet_nano", widths=(4, 6, 8), num_classes=3), (1, 3, 64, 128)),
    "upcycled": (lambda: _upcycled_by_name(), (2, 1, 64, 64)),
}


def _upcycled_by_name() -> SavableModel:
    model = create_network("timm:resnet18", num_classes=3, in_chans=1, channels=(4, 4, 6, 8))
    model.upcycle(num_experts=2, example=values("example", 1, 1, 64, 64).float())
    return model


def make_saved(name: str) -> SavableModel:
    """The network that a folder under ``saved`` was made of."""
    return fill(_SAVED[name][0]())


def saved(name: str, folder: Path | None = None, dtype: torch.dtype = torch.float64) -> Recorded:
    """The outputs of a folder; None: the one of that name under ``saved``."""
    return _evaluated(load_model(folder or SAVED / name), images("images", *_SAVED[name][1]), dtype)


PARTS: dict[str, Mapping[str, Recipe]] = {
    "networks": {name: partial(network, name) for name in NETWORKS},
    "layers": LAYERS,
    "pretrained": PRETRAINED,
    "upcycled": UPCYCLED,
    "saved": {name: partial(saved, name) for name in _SAVED},
}


# What is kept of it


def digest(name: str, tensor: Tensor) -> list[float]:
    """Four numbers that hardly any change of a tensor leaves alone: its largest entry, one entry, its norm, and its sum
    under random signs. 13 digits: they are compared to 10."""
    flat = tensor.detach().double().flatten()
    drawn = values(f"{name} {tuple(tensor.shape)}", len(flat) + 1)
    one = flat[int((drawn[-1] + 1) / 2 * len(flat))]
    numbers = (flat.abs().max(), one, flat.norm(), (flat * drawn[:-1].sign()).sum())
    return [float(f"{float(number):.13g}") for number in numbers]


def digests(recorded: Recorded) -> dict[str, Any]:
    """What is kept of a recipe, of types that JSON knows."""
    groups = {
        group: {name: digest(name, tensor) for name, tensor in tensors.items()}
        for group, tensors in recorded.tensors.items()
    }
    return {**recorded.plain, **groups}


# Of the largest tensor of a group: what is smaller is compared as if it were as large as that. A gradient that is zero
# but for rounding (of a shift that a normalisation takes off again) has no digits of its own.
FLOOR = 1e-4


def differences(
    found: Mapping[str, list[float]], expected: Mapping[str, list[float]], tolerance: float = 1e-10
) -> list[str]:
    """The tensors of a group that differ: an entry by more than ``tolerance`` of the largest entry, or norm and sum by
    more than that of the norm."""
    if found.keys() != expected.keys():
        return [f"{name} is in one of them only" for name in sorted(found.keys() ^ expected.keys())]
    largest = max((numbers[0] for numbers in expected.values()), default=0.0)
    longest = max((numbers[2] for numbers in expected.values()), default=0.0)
    wrong = []
    for name, numbers in expected.items():
        scales = [max(numbers[0], FLOOR * largest)] * 2 + [max(numbers[2], FLOOR * longest)] * 2
        off = max(
            abs(new - old) / scale if scale else abs(new - old)
            for new, old, scale in zip(found[name], numbers, scales, strict=True)
        )
        if not off <= tolerance:  # NaN is a difference, too
            wrong.append(f"{name} is off by {off:.1e}: {found[name]}, expected {numbers}")
    return wrong
