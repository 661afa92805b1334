"""What is measured: layers and networks beside their dense twins, on random images, with a fair routing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from pcenet.benchmark.config import Shape
from pcenet.benchmark.timing import Call
from pcenet.nn import PCELayer, Router, Routing, aux_loss, record_routing
from pcenet.nn.experts import double_conv

# Every batch is another one, so that the experts' counts change from step to step, as in training.
BATCHES = 3
CLASSES = 10
BALANCED = 1.2  # most patches of an expert by fewest
BALANCE_STEPS = 60


class DenseLayer(nn.Module):
    """A layer's dense twin: the block of one expert, run on the whole map, and the shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = double_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        return x + self.body(x)


def make_layer(shape: Shape, experts: int, border: Any) -> PCELayer:
    """A layer of equal widths that drops nothing, channels-last."""
    layer = PCELayer(
        shape.channels,
        shape.channels,
        patch_size=shape.patch,
        num_experts=experts,
        border=border,
        capacity_factor=None,
    )
    return layer.to(memory_format=torch.channels_last)


def make_batches(
    batch: int, channels: int, size: tuple[int, int], device: torch.device, *, needs_grad: bool = False
) -> list[Tensor]:
    """Different batches of noise, channels-last."""
    return [
        torch.randn(batch, channels, *size, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_(needs_grad)
        for _ in range(BATCHES)
    ]


def load_rival(path: str) -> Callable[[PCELayer], nn.Module]:
    """``make_layer`` of a Python file.

    Raises:
        ValueError: if the file cannot be run or has no such function.
    """
    spec = importlib.util.spec_from_file_location("rival", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"against={path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"against={path!r} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "make_layer", None)):
        raise ValueError(f"against={path!r} has no function make_layer(layer)")
    rival: Callable[[PCELayer], nn.Module] = module.make_layer
    return rival


def balance(model: nn.Module, batches: list[Tensor]) -> float:
    """Give every expert of every layer about the same number of patches, as a trained router does.

    An untrained router sends nearly everything to one expert, and the cost of that is not the cost of the network. The
    last layer of each router is scaled so that its logits have unit variance, and its bias then moves against the load;
    a balancing bias has nothing left to do and is 0.

    Returns:
        The largest max/min load that is left at evaluation, over all layers and batches.
    """
    model.eval()  # in training a bias evens out whatever is left, batch by batch
    routers = [module for module in model.modules() if isinstance(module, Router)]
    with torch.no_grad():
        for router in routers:
            _balance(router, torch.cat([_logits(model, router, batch) for batch in batches]))
        worst = 1.0
        for batch in batches:
            with record_routing(model) as records:
                model(batch)
            for routings in records.values():
                loads = routings[0].expert_counts
                worst = max(worst, float(loads.max()) / max(1.0, float(loads.min())))
    return worst


def _logits(model: nn.Module, router: Router, batch: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, _routing: Routing) -> None:
        found.append(router.compute_logits(args[0]))  # those of the routing have the balancing bias in them

    handle = router.register_forward_hook(keep)
    try:
        model(batch)
    finally:
        handle.remove()
    return found[0]


def _balance(router: Router, logits: Tensor) -> None:
    weight, bias = router.logits.weight, router.logits.bias
    scale, shift = 1 / logits.std(0).clamp(min=1e-6), logits.mean(0)
    logits = (logits - shift) * scale
    moved = torch.zeros_like(bias)
    fair = len(logits) / router.num_experts
    for step in range(BALANCE_STEPS):
        load = torch.bincount((logits + moved).argmax(1), minlength=router.num_experts)
        if load.max() <= BALANCED * load.min():
            break
        moved -= 0.3 / (1 + step / 10) * (load / fair - 1).clamp(-1, 1)
    weight.mul_(scale[:, None])
    bias.copy_((bias - shift) * scale + moved)
    for buffer in router.buffers():  # the biases of its own balancing
        buffer.zero_()


def autocast(x: Tensor, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device of x, or nothing."""
    if precision == "bf16":
        return torch.autocast(x.device.type, dtype=torch.bfloat16)
    return nullcontext()


def forward_call(model: nn.Module, batches: list[Tensor], precision: str) -> Call:
    """Evaluation without gradients; the round decides the batch."""

    def call(index: int) -> None:
        model.eval()
        x = batches[index % len(batches)]
        with torch.inference_mode(), autocast(x, precision):
            model(x)

    return call


def layer_step_call(layer: nn.Module, batches: list[Tensor], precision: str) -> Call:
    """Forward and backward of a layer in training, gradients of its input too."""
    direction = torch.randn_like(batches[0])

    def call(index: int) -> None:
        layer.train()
        x = batches[index % len(batches)]
        with autocast(x, precision):
            out = layer(x)
        out.backward(direction.to(out.dtype))
        layer.zero_grad()
        x.grad = None

    return call


@contextmanager
def _no_records(_model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    yield {}


def make_optimiser(model: nn.Module) -> torch.optim.AdamW:
    """That of a training step."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def model_step_call(
    model: nn.Module,
    batches: list[Tensor],
    precision: str,
    *,
    segments: bool,
    optimiser: torch.optim.Optimizer | None = None,
) -> Call:
    """A whole training step of a network: forward, loss, backward, AdamW; the loss has the routers' terms, but for a
    compiled network, which calls no recorder."""
    recorder = _no_records if isinstance(model, OptimizedModule) else record_routing
    optimiser = make_optimiser(model) if optimiser is None else optimiser
    shape = (len(batches[0]), *batches[0].shape[2:]) if segments else (len(batches[0]),)
    target = torch.randint(CLASSES, shape, device=batches[0].device)

    def call(index: int) -> None:
        model.train()
        x = batches[index % len(batches)]
        with recorder(model) as records, autocast(x, precision):
            out = model(x)
        loss = F.cross_entropy(out.float(), target)
        if records:
            loss = loss + aux_loss(records)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return call
