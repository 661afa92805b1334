"""Which convolutions a network has, and how they run: found out by running it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.nn import PCEConv2d, PCELayer
from pcenet.nn.conv import why_not

IMAGE_SIDE = 224
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Found:
    """A 3x3 convolution of a network.

    Attributes:
        name: of the module.
        block: name of the module that it is a child of, where that decides itself what its children do; None where it
            only lists them.
        reason: why it cannot be converted; None where it can.
        converted: whether it is a `PCEConv2d` already.
        order: its place among the convolutions in the order in which they run.
        maps: sizes of the maps that it saw in the trial pass, one for each time that it ran.
        other_map_size: height and width of its map for an image of odd sides, if the network takes one: maps that are
            of one size in the trial pass, before and after they were halved and enlarged, may differ there.
    """

    name: str
    block: str | None
    reason: str | None
    converted: bool = False
    order: int = 0
    maps: list[tuple[int, ...]] = field(default_factory=list)
    other_map_size: tuple[int, int] | None = None

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of its map."""
        return self.maps[0][2], self.maps[0][3]


def survey(model: nn.Module, example: tuple[Any, ...]) -> tuple[list[Found], Any]:
    """All 3x3 convolutions of a network, in the order in which they run, and what the network made of the example.

    Those inside PCE layers are not among them.

    Args:
        model: it is run once, in evaluation mode, and left as it was.
        example: the arguments of its forward pass.

    Raises:
        ValueError: if the network does not take the example.
    """
    found, order = list(_convolutions(model)), count()
    with ExitStack() as stack:
        for module, entry in found:

            def note(_module: nn.Module, args: tuple[Any, ...], entry: Found = entry) -> None:
                if not entry.maps:
                    entry.order = next(order)
                entry.maps.append(tuple(args[0].shape))

            stack.callback(module.register_forward_pre_hook(note).remove)
        try:
            output = run(model, example)
        except Exception as error:
            raise ValueError(
                f"example: the network cannot be tried on it ({type(error).__name__}: {error}); give the argument of "
                "its forward pass, such as a batch of one image, as example="
            ) from error
    _note_other_sizes(model, found, example)
    entries = sorted((entry for _, entry in found), key=lambda entry: (not entry.maps, entry.order))
    for entry in entries:
        entry.reason = entry.reason or _how_it_ran(entry)
    return entries, output


def _note_other_sizes(model: nn.Module, found: Sequence[tuple[nn.Module, Found]], example: tuple[Any, ...]) -> None:
    """Run the network on the example without its last row and column, where it takes that."""
    first = example[0] if example else None
    if not isinstance(first, Tensor) or first.ndim != 4 or min(first.shape[2:]) < 2:
        return
    with ExitStack() as stack:
        for module, entry in found:

            def note(_module: nn.Module, args: tuple[Any, ...], entry: Found = entry) -> None:
                height, width = args[0].shape[-2:]
                entry.other_map_size = (height, width)

            stack.callback(module.register_forward_pre_hook(note).remove)
        with suppress(Exception):
            run(model, (first[:, :, :-1, :-1], *example[1:]))


def _how_it_ran(entry: Found) -> str | None:
    """Why a convolution that ran like this cannot be converted; None where it can."""
    if not entry.maps:
        return "it did not run in the trial pass; its weight may be used in another way"
    if len(entry.maps) > 1:
        return f"it runs {len(entry.maps)} times in a pass"
    if len(entry.maps[0]) != 4:
        return f"its input has {len(entry.maps[0])} axes, not 4"
    return None


def _convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, Found]]:
    """The 3x3 convolutions of a network, each once, with what can be said of them without running it."""
    modules = dict(_outside_pce_layers(model, ""))
    names: defaultdict[int, list[str]] = defaultdict(list)
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for name, module in modules.items():
        names[id(module)].append(name)
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(names[id(module)][0])
    for name, module in modules.items():
        if not isinstance(module, nn.Conv2d | PCEConv2d) or tuple(module.kernel_size) != (3, 3):
            continue
        places = names[id(module)]
        if name != places[0]:
            continue
        parent = name.rpartition(".")[0]
        block = None if isinstance(modules[parent], CONTAINERS) else parent
        if isinstance(module, PCEConv2d):
            yield module, Found(name, block, "it is a PCEConv2d already", converted=True)
            continue
        reason = why_not(module)
        own = module.parameters(recurse=False)
        others = set().union(*(owners[id(parameter)] for parameter in own)) - {name}
        if not name:
            reason = "it is the whole network; make a PCEConv2d of it by PCEConv2d.from_conv2d"
        elif len(places) > 1:
            reason = f"it stands in several places: {', '.join(places)}"
        elif others:
            reason = f"its weight is also that of {', '.join(sorted(others))}"
        yield module, Found(name, block, reason)


def _outside_pce_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by all of their names, without what PCE layers and convolutions are made of."""
    yield name, module
    if not isinstance(module, PCELayer | PCEConv2d):
        for child_name, child in module._modules.items():  # named_children leaves out a second name
            if child is not None:
                yield from _outside_pce_layers(child, f"{name}.{child_name}" if name else child_name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the network is in evaluation mode and makes no gradients; afterwards each module is as it was."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def run(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """What a network makes of an example in evaluation mode."""
    with evaluating(model):
        return model(*example)


def make_example(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The arguments of the trial pass: those given, or an image of noise of the network's size, else of 224 px.

    The noise has a generator of its own, so that what is random otherwise does not depend on it.
    """
    if example is not None:
        return example if isinstance(example, tuple) else (example,)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | PCEConv2d | PCELayer)), None)
    if first is None:
        return (torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE),)
    cfg = getattr(model, "pretrained_cfg", None)
    known = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    height, width = known[1:] if known else (IMAGE_SIDE, IMAGE_SIDE)
    noise = torch.randn(1, first.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    reference = next(first.parameters())
    return (noise.to(reference.device, reference.dtype),)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a network's output, whatever they are packed in."""
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
