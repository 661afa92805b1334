"""What a forward pass would do on a GPU, with tensors that say they are there and hold nothing.

Everything has to stay on the device: a look at a number, or a tensor from the processor, would make the processor wait
for the GPU in every layer, and forbid CUDA graphs. (torch's engine asks the driver for the device in a backward pass,
which therefore cannot be looked at like this.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pcenet
from pcenet.nn import PCEConv2d, PCELayer, aux_terms, record_routing

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no GPU")


class OnGpu(TorchDispatchMode):
    """Notes the operators that have to do with tensors elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        if any(each.device.type != "cuda" for each in tensors):
            self.elsewhere.append(str(func))
        return out


def put_on_gpu(module: nn.Module) -> None:
    """Put tensors without numbers in place of a module's own."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cuda")


def passes(module: nn.Module, *size: int) -> list[str]:
    """A pass in training with its losses, and one at evaluation; what had to do with another device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_gpu(module)
        x = torch.empty(size, device="cuda")
        with OnGpu() as seen:
            with record_routing(module.train()) as records:
                module(x)
            if records:  # a dense network's are the number 0
                aux_terms(records)
            with torch.no_grad():
                module.eval()(x)
    return seen.elsewhere


@pytest.mark.parametrize(
    "options",
    [
        {"border": "exchange"},
        {"border": "halo", "top_k": 2, "capacity_factor": 1.0},
        {"border": "zero", "gate_input": "flat", "gate": "straight_through"},
        {"gate_input": "position", "shared_kernel": False},
        {"balancing": "none"},
    ],
    ids=str,
)
def test_a_layer_never_waits(options: dict[str, Any]) -> None:
    assert passes(PCELayer(4, 4, patch_size=3, num_experts=3, **options), 2, 4, 7, 6) == []


def test_a_convolution_never_waits() -> None:
    assert passes(PCEConv2d(4, 6, 3, patch_size=2, num_experts=3), 2, 4, 7, 6) == []


@pytest.mark.parametrize(("name", "size"), [("pce_nano", 32), ("pce_unet_nano", 64), ("dense_nano_condconv", 32)])
def test_a_network_never_waits(name: str, size: int) -> None:
    assert passes(pcenet.create_network(name, num_classes=5), 2, 3, size, size) == []


def test_waiting_would_be_seen() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    class Brings(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(x.shape).to(x.device)

    with pytest.raises(DataDependentOutputException):
        passes(Looks(), 2, 3)
    assert passes(Brings(), 2, 3)
