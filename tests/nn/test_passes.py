"""What a layer costs where the compiled operators run: calls of these, and other passes over a map.

A pass over a map is a call of any operator that takes or makes a tensor of a map's size, views aside. Speed is these
passes; each one more is found here, whatever machine runs the tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcenet.nn import PCEConv2d, PCELayer, fourier

CHANNELS, SIZE = 8, (2, 32, 32)  # maps have 16,384 numbers, everything else has fewer
MAP = SIZE[0] * CHANNELS * SIZE[1] * SIZE[2]

# A router makes one pass; an expert's convolution is one, and at evaluation one call is the expert. A batch
# normalisation reads its input for the moments, and again to be applied, with activation, gate value and shortcut.
NORM = ["expert_moments", "patch_affine"]
TRAINING = ["patch_perceptron", "patch_conv2d", *NORM, "patch_conv2d", *NORM]
# Backwards a normalisation needs two sums over its map before the gradient of its input; a convolution has gradients
# for input and weight. The input of a layer goes into its shortcut, the first convolution and the router: their three
# gradients are added up in two sums, which autograd does.
NORM_BACK = ["patch_affine_sums", "patch_affine_input_grad"]
CONV_BACK = ["patch_conv2d_input_grad", "patch_conv2d_weight_grad"]
BLOCK_BACK = [*NORM_BACK, *CONV_BACK, *NORM_BACK, *CONV_BACK]


pytestmark = pytest.mark.usefixtures("compiled_operators")


class Calls(TorchDispatchMode):
    """Passes over maps, and all calls but views."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[str] = []
        self.all: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        self.all.append(func._opname)
        sizes = [each.numel() for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)]
        if max(sizes, default=0) >= MAP or (func.namespace == "pcenet" and func._opname != "balancing_bias"):
            self.passes.append(func._opname)
        return found


def image(channels: int = CHANNELS) -> Tensor:
    return torch.randn(SIZE[0], channels, *SIZE[1:]).contiguous(memory_format=torch.channels_last)


def check(what: str, calls: Calls, expected: list[str]) -> None:
    assert calls.passes == expected, (
        f"{what}: passes over a map are\n  {calls.passes}\nand should be\n  {expected}\n"
        "Each one more is time that the dense twin does not take: a copy often comes from a layout that an operator "
        "does not give or take (maps are channels-last), a product or a sum from what an operator could include."
    )


LAYERS: dict[str, tuple[Any, list[str], list[str], list[str]]] = {
    **{
        f"layer, {border}": (
            lambda border=border: PCELayer(CHANNELS, CHANNELS, patch_size=4, border=border),
            ["patch_logits", "expert_block"],
            TRAINING,
            [*BLOCK_BACK, "add", "patch_perceptron_backward", "add"],
        )
        for border in ("zero", "halo", "exchange")
    },
    "layer without shortcut": (
        lambda: PCELayer(CHANNELS, CHANNELS, patch_size=4, shortcut=False, shared_kernel=False),
        ["patch_logits", "expert_block"],
        TRAINING,
        [*BLOCK_BACK, "patch_perceptron_backward", "add"],  # two gradients for the input
    ),
    "wider layer": (  # whose shortcut is a convolution
        lambda: PCELayer(CHANNELS, 2 * CHANNELS, patch_size=4),
        ["patch_logits", "convolution", "expert_block"],
        ["patch_perceptron", "convolution", *TRAINING[1:]],
        [*BLOCK_BACK, "convolution_backward", "add", "patch_perceptron_backward", "add"],
    ),
    "convolution": (  # its bias and gate are one more pass where gradients are needed
        lambda: PCEConv2d(CHANNELS, CHANNELS, patch_size=4),
        ["patch_logits", "patch_conv2d"],
        ["patch_perceptron", "patch_conv2d", "patch_affine"],
        [*NORM_BACK, *CONV_BACK, "patch_perceptron_backward", "add"],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_passes_over_the_map(name: str) -> None:
    make, evaluation, training, backward = LAYERS[name]
    layer: nn.Module = make()
    assert all(parameter.numel() < MAP for parameter in layer.parameters())
    x = image()
    layer.eval()
    with torch.no_grad():
        layer(x)  # positions are computed once for a size
        with Calls() as calls:
            layer(x)
    check("evaluation", calls, evaluation)
    layer.train()
    x.requires_grad_()
    with Calls() as calls:
        out = layer(x)
    check("training, forwards", calls, training)
    direction = torch.randn_like(out)
    with Calls() as calls:
        torch.autograd.grad(out, [x, *layer.parameters()], direction)
    check("training, backwards", calls, backward)


def test_the_first_layers_input_needs_no_gradient() -> None:
    """Neither a convolution's nor the router's for the image is computed."""
    layer, x = PCELayer(CHANNELS, CHANNELS, patch_size=4), image()
    out = layer(x)
    direction = torch.randn_like(out)
    with Calls() as calls:
        torch.autograd.grad(out, list(layer.parameters()), direction)
    check("backwards", calls, [*BLOCK_BACK[:-2], "patch_conv2d_weight_grad", "patch_perceptron_backward"])


# Calls of a few numbers each, which at batch 1 are the time. A router: the operator; softmax, argmax, gather; and two
# for who is served.
ROUTER = 1 + 3 + 2


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("layer, halo", ROUTER + 1),
        ("layer, exchange", ROUTER + 1),
        ("convolution", ROUTER + 4 + 1),  # whose gate is divided by itself
    ],
)
def test_calls_for_one_image(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: nn.Module = LAYERS[name][0]().eval()
    x = image()[:1]
    with torch.inference_mode():
        layer(x)
        # Positions are kept, but under a mode like that of the count, which may be a tracer's.
        monkeypatch.setattr(fourier, "_make_lines", fourier._kept_lines)
        with Calls() as calls:
            layer(x)
    assert len(calls.all) <= most, f"{len(calls.all)} calls, of which {most} are known:\n{calls.all}"


def test_counting_sees_a_pass() -> None:
    x = image()
    with Calls() as calls:
        (x.contiguous() * 2).permute(0, 2, 3, 1)
    assert calls.passes == ["clone", "mul"]
