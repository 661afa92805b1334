"""What processes that train together exchange in a step, by arithmetic: ``python benchmarks/exchange.py``.

Bytes that one process sends (it receives as many), for ring algorithms, whose share (W - 1) / W of W processes is left
out: it is 1/2 for two processes and 1 for many. Weights and gradients are float32, as they are under autocast too.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

import pcenet
from pcenet.nn import PCELayer, record_routing
from pcenet.nn.experts import ConvExperts
from pcenet.nn.stacked import SharedConv2d

MODELS = {"pce_nano": 32, "pce_tiny": 224, "pce_small": 224}
FLOAT = 4
FORTH_AND_BACK = 2 * 2  # patches go to their experts and return, in the forward and in the backward pass


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of one network.

    Attributes:
        parameters: all.
        experts: those that belong to one expert each, of all experts.
        buffers: bytes.
        layers: routed layers.
        patches: of one image, in all layers.
        logits: of one image, in all layers.
        values: of one image that routed layers read, without borders.
    """

    parameters: int
    experts: int
    buffers: int
    layers: int
    patches: int
    logits: int
    values: int


def sizes_of(name: str, side: int) -> Sizes:
    """Count them on a network and one image."""
    model = timm.create_model(name).eval()
    values: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _module, inputs, _output: values.append(inputs[0].numel()))
        for module in model.modules()
        if isinstance(module, PCELayer)
    ]
    with record_routing(model) as records, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    routings = [routing for found in records.values() for routing in found]
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        experts=sum(own_of_experts(m) for m in model.modules() if isinstance(m, ConvExperts)),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        layers=len(routings),
        patches=sum(len(routing.logits) for routing in routings),
        logits=sum(routing.logits.numel() for routing in routings),
        values=sum(values),
    )


def own_of_experts(experts: nn.Module) -> int:
    """Parameters that belong to one expert each: all but the kernels that they share."""
    shared = sum(m.shared.numel() for m in experts.modules() if isinstance(m, SharedConv2d))
    return sum(p.numel() for p in experts.parameters()) - shared


def mega(count: float) -> str:
    """Millions, of bytes mostly."""
    return f"{count / 1e6:.2f}"


def main() -> None:
    """Print the tables of docs/scaling.md."""
    found = {name: sizes_of(name, side) for name, side in MODELS.items()}
    print(f"pcenet {pcenet.__version__}, torch {torch.__version__}; millions of bytes in a step and process\n")
    print("| | parameters | routed layers | patches per image | ddp: gradients | fsdp: weights, gradients |", end="")
    print(" running statistics | router logits per image and other process |")
    print("|---|---|---|---|---|---|---|---|")
    for name, s in found.items():
        ddp, fsdp = 2 * FLOAT * s.parameters, 3 * FLOAT * s.parameters
        print(f"| `{name}` | {mega(s.parameters)} M | {s.layers} | {s.patches} | {mega(ddp)} | {mega(fsdp)} |", end="")
        print(f" {mega(s.buffers)} | {s.logits * FLOAT:,} bytes |")
    print("\n| | experts' own parameters | values that routed layers read, per image |", end="")
    print(" expert parallelism, per image | equal to ddp below | with 64 experts below |")
    print("|---|---|---|---|---|---|")
    for name, s in found.items():
        moved = FORTH_AND_BACK * FLOAT * s.values
        limit = 2 * FLOAT * s.experts / moved
        print(f"| `{name}` | {mega(s.experts)} M | {s.values:,} | {mega(moved)} |", end="")
        print(f" {limit:.1f} images | {16 * limit:.0f} images |")


if __name__ == "__main__":
    main()
