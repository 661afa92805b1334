"""Under torch.compile: "static" dispatch is one graph, "sorted" a bounded number, and no step is compiled again."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pcenet.models.blocks import ResidualBlock
from pcenet.models.registry import create_network
from pcenet.nn import PCELayer, Routing
from pcenet.nn.routing import Router

EXPERTS = 3


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def favour(model: nn.Module, expert: int) -> None:
    """Change the routing: most patches go to another expert than before."""
    for router in model.modules():
        if isinstance(router, Router):
            with torch.no_grad():
                router.logits.bias.copy_(2.0 * (torch.arange(router.num_experts) == expert))


def assert_same_steps(
    model: nn.Module, compiled: nn.Module, inputs: list[Tensor], rtol: float, atol: float, warm_up: int = 1
) -> None:
    """One step on each input, each with another routing: outputs, gradients of everything and running statistics of a
    network and of its compiled copy. Only the first steps may compile."""
    for step, x in enumerate(inputs):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        favour(model, step)
        favour(compiled, step)
        expected = model(ours)
        with torch.compiler.set_stance("default" if step < warm_up else "fail_on_recompile"):
            found = compiled(theirs)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
        direction = torch.randn_like(expected)
        for output in (expected, found):
            (output * direction).sum().backward()
        reference.assert_same({"x": theirs.grad, **grads(compiled)}, {"x": ours.grad, **grads(model)}, rtol, atol)
        reference.assert_same(dict(plain_names(compiled.named_buffers())), dict(model.named_buffers()), rtol, atol)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in plain_names(model.named_parameters())}


def plain_names(tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix("_orig_mod."), tensor) for name, tensor in tensors)


def loads(layer: PCELayer, inputs: list[Tensor]) -> list[list[int]]:
    """What each step of `assert_same_steps` asks of the experts."""
    layer, found = copy.deepcopy(layer), []
    for step, x in enumerate(inputs):
        favour(layer, step)
        routing: Routing = layer.router(x)
        found.append(routing.kept_load.tolist())
    return found


# "static"


def make_layer(border: str, patch_size: int, norm: str, training: bool, balancing: str = "none") -> PCELayer:
    layer = PCELayer(
        3,
        4,
        patch_size=patch_size,
        num_experts=EXPERTS,
        border=border,
        norm=norm,
        num_bands=1,
        balancing=balancing,
        dispatch="static",
    )
    layer = reference.randomise(layer.double(), seed=1).train(training)
    with torch.no_grad():
        layer.router.logits.weight.mul_(0.3)  # so that the bias decides for most patches
    return layer


# Two by default; all of them together are slow.
CASES = list(itertools.product(["zero", "halo", "exchange"], [1, 2, 4], ["batch", "group"], [True, False]))
QUICK = [("halo", 4, "group", False), ("exchange", 2, "batch", True)]


@pytest.mark.parametrize(
    ("border", "patch_size", "norm", "training"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_static_dispatch_is_one_graph_for_every_routing(
    border: str, patch_size: int, norm: str, training: bool
) -> None:
    """Forwards and backwards, on a map that patches of 2 and 4 do not divide."""
    layer = make_layer(border, patch_size, norm, training)
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    asked = loads(layer, inputs)
    assert len({tuple(load) for load in asked}) == len(inputs), f"no test without other loads: {asked}"
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same_steps(layer, compiled, inputs, 1e-9, 1e-10)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(inputs[0].float())  # the stance sees it where there is something to compile


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_balancing_is_part_of_the_one_graph(training: bool) -> None:
    layer = make_layer("halo", 2, "batch", training, balancing="batch")
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same_steps(layer, compiled, inputs, 1e-9, 1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [True, False])
def test_static_dispatch_under_inductor(training: bool) -> None:
    layer = make_layer("halo", 2, "batch", training)
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    assert_same_steps(layer, torch.compile(copy.deepcopy(layer), fullgraph=True), inputs, 1e-9, 1e-10)


@pytest.mark.slow
def test_a_temperature_that_changes_compiles_once_more_and_no_more() -> None:
    """A number is a constant to torch.compile until it changes, and then an argument."""
    layer = make_layer("zero", 4, "batch", True)
    graphs = CountingBackend()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    compiled(x)
    assert graphs.made == 1
    layer.router.temperature = 2.0
    compiled(x)
    assert graphs.made == 2
    for temperature in (1.7, 1.5, 1.0, 0.5):
        layer.router.temperature = temperature
        with torch.compiler.set_stance("fail_on_recompile"):
            found = compiled(x)
        torch.testing.assert_close(found, layer(x))
    layer.router.temperature = -1.0
    with pytest.raises(Exception, match="temperature"):
        compiled(x)


# "sorted"


class CountingBackend:
    """Runs graphs as they are, or by another backend, and counts them.

    Attributes:
        made: graphs compiled.
        ran: graphs run.
    """

    def __init__(self, backend: str = "eager") -> None:
        self.made = self.ran = 0
        self._compile: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1
        compiled = self._compile(graph, inputs)

        def run(*args: Any) -> Any:
            self.ran += 1
            return compiled(*args)

        return run


# torch.compile itself asks tensors between two graphs for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "side", "backend", "dynamic"),
    [
        pytest.param("pce_nano", 32, "eager", False, id="pce_nano", marks=pytest.mark.slow),
        pytest.param("pce_nano", 32, "aot_eager", None, id="pce_nano as by default", marks=pytest.mark.slow),
        pytest.param("pce_unet_nano", 64, "aot_eager", False, id="pce_unet_nano", marks=pytest.mark.slow),
        pytest.param("pce_unet_nano", 64, "aot_eager", None, id="pce_unet_nano as by default", marks=pytest.mark.slow),
    ],
)
def test_networks_with_sorted_dispatch(name: str, side: int, backend: str, dynamic: bool | None) -> None:
    """The dispatch itself is never compiled, and breaks the graph of every function that it is called from. Of a layer
    that leaves two graphs, its router and the sum of its block, and between two layers a third one at most.

    (With torch._dynamo.config.nested_graph_breaks functions are no longer compiled apart.) Blocks of a dense stage are
    compiled again, apart, in the second step: no `nn.Sequential` is compiled once a graph broke in one.
    """
    model = create_network(name, num_classes=4).double()
    layers = sum(isinstance(module, PCELayer) for module in model.modules())
    dense = sum(isinstance(module, ResidualBlock) for module in model.modules()) - layers
    graphs = CountingBackend(backend)
    compiled = torch.compile(copy.deepcopy(model), backend=graphs, dynamic=dynamic)
    for training in (True, False):
        model.train(training)
        compiled.train(training)
        steps = [torch.randn(2, 3, side, side, dtype=torch.float64) for _ in range(3)]
        graphs.ran = 0
        assert_same_steps(model, compiled, steps, 1e-8, 1e-9, warm_up=2 if dense else 1)
        assert 2 * layers <= graphs.ran / len(steps) <= 3 * layers + 1 + dense
        for reason in counters["graph_break"]:
            assert "_run_sorted" in reason.splitlines()[1], reason
