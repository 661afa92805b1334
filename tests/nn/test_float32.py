"""What people do with a layer in float32, in which the compiled operators run, and the reference elsewhere: mixed
precision, activation checkpointing, copies in threads. Most other tests of layers are in float64, for its accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import BACKENDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcenet.nn import PCEConv2d, PCELayer
from pcenet.ops import library


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.choice()
    try:
        library.use(request.param)
    except ValueError as error:
        pytest.skip(f"NOT RUN, and not tested on this machine: {request.param} ({error})")
    yield request.param
    library.use(before.instructions or "reference")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        border: lambda border=border: PCELayer(6, 6, patch_size=3, num_experts=3, border=border)
        for border in ("zero", "halo", "exchange")
    },
    "two experts per patch": lambda: PCELayer(6, 8, patch_size=2, top_k=2, capacity_factor=1.0),
    "conv": lambda: PCEConv2d(6, 8, patch_size=3),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def image() -> Tensor:
    return torch.randn(2, 6, 11, 9)


def step(layer: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    """The output, and all gradients."""
    out = run(layer, x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    x.grad = None
    out.backward(direction)
    grads = {name: each.grad for name, each in {"x": x, **dict(layer.named_parameters())}.items()}
    return {"": out.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@each_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    layer, x = LAYERS[name](), image().requires_grad_()
    twin = copy.deepcopy(layer)
    expected = step(layer, x, plainly)
    found = step(twin, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@each_layer
@pytest.mark.parametrize("half_input", [False, True])
def test_types_under_autocast(name: str, half_input: bool) -> None:
    """Maps in bfloat16; gradients in the type of what they are of; a float32 shortcut is added in float32."""
    layer = LAYERS[name]()
    x = (image().bfloat16() if half_input else image()).requires_grad_()

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    found = step(layer, x, run)
    carried = isinstance(layer, PCELayer) and isinstance(layer.shortcut, nn.Identity) and not half_input
    assert found.pop("").dtype == (torch.float32 if carried else torch.bfloat16)
    for key, grad in found.items():
        assert grad.dtype == (x.dtype if key == "x" else torch.float32), key
        assert grad.isfinite().all(), key


@each_layer
def test_a_step_under_autocast_is_near_one_in_float32(name: str) -> None:
    """Each rounding to bfloat16 is one of 2^-9 at most, and outputs and gradients pass through a handful of them."""
    layer, x = LAYERS[name](), image().requires_grad_()
    twin = copy.deepcopy(layer)
    expected = step(layer, x, plainly)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    found = step(twin, x, run)
    # Balancing takes away what all patches share: its bias has no gradient but what rounding leaves.
    for key in expected.keys() - {"router.logits.bias"}:
        error = (found[key].float() - expected[key]).norm() / expected[key].norm()
        assert error < 0.05, f"{key}: {error:.3f}"


@each_layer
def test_float32_is_near_float64(name: str, backend: str) -> None:
    """Routing is the same; everything else differs by a few hundred roundings of 6e-8."""
    layer, x = LAYERS[name](), image().requires_grad_()
    twin = copy.deepcopy(layer).double()
    expected = step(twin, x.detach().double().requires_grad_(), plainly)
    found = step(layer, x, plainly)
    for key in expected.keys() - {"router.logits.bias"}:
        error = (found[key].double() - expected[key]).norm() / expected[key].norm()
        assert error < 2e-5, f"{key}: {error:.1e}"


@each_layer
def test_replicas_in_threads(name: str) -> None:
    """What DataParallel does with several devices: copies of a network, each in a thread, on their parts of a batch."""
    layer = LAYERS[name]().eval()
    parts = [image() for _ in range(4)]
    with torch.no_grad():
        expected = [layer(part) for part in parts]
        copies = [copy.deepcopy(layer) for _ in parts]
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(torch.no_grad()(lambda own, part: own(part)), copies, parts))
    for own, right in zip(found, expected, strict=True):
        # Bit for bit where kernels of ours run; torch's round as the threads of the thread that calls them have it.
        exact = library.choice().instructions is not None
        torch.testing.assert_close(own, right, **({"rtol": 0, "atol": 0} if exact else {}))
