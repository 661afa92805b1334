"""Under torch.compile a network is one graph, in training and at evaluation, whatever its routings are."""

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

from pcenet.models.registry import create_network, list_models
from pcenet.nn import PCELayer, Routing
from pcenet.nn.routing import Router

EXPERTS = 3


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
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


def choices(layer: PCELayer, inputs: list[Tensor]) -> list[list[list[int]]]:
    """The routing of each step of `assert_same_steps`."""
    layer, found = copy.deepcopy(layer), []
    for step, x in enumerate(inputs):
        favour(layer, step)
        routing: Routing = layer.router(x)
        found.append(routing.expert_ids.tolist())
    return found


def make_layer(border: str, patch_size: int, training: bool, balancing: str = "none", **options: Any) -> PCELayer:
    layer = PCELayer(
        3, 4, patch_size=patch_size, num_experts=EXPERTS, border=border, num_bands=1, balancing=balancing, **options
    )
    layer = reference.randomise(layer.double(), seed=1).train(training)
    with torch.no_grad():
        layer.router.logits.weight.mul_(0.3)  # so that the bias decides for most patches
    return layer


# Two by default; all of them together are slow.
CASES = list(itertools.product(["zero", "halo", "exchange"], [1, 2, 4], [1, 2], [True, False]))
QUICK = [("halo", 4, 1, False), ("exchange", 2, 2, True)]


@pytest.mark.parametrize(
    ("border", "patch_size", "top_k", "training"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_layer_is_one_graph_for_every_routing(border: str, patch_size: int, top_k: int, training: bool) -> None:
    """Forwards and backwards, on a map that patches of 2 and 4 do not divide."""
    layer = make_layer(border, patch_size, training, top_k=top_k)
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    routings = choices(layer, inputs)
    assert all(routings.count(routing) == 1 for routing in routings), "no test without other routings"
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same_steps(layer, compiled, inputs, 1e-9, 1e-10)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(inputs[0].float())  # the stance sees it where there is something to compile


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_balancing_is_part_of_the_one_graph(training: bool) -> None:
    layer = make_layer("halo", 2, training, balancing="batch")
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same_steps(layer, compiled, inputs, 1e-9, 1e-10)


def test_evaluation_without_gradients_is_one_graph_for_every_routing() -> None:
    layer = make_layer("exchange", 2, False, balancing="batch")
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for step in range(3):
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
        favour(layer, step)
        favour(compiled, step)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-9, atol=1e-10)


def float32_layer(border: str, patch_size: int, training: bool, **options: Any) -> PCELayer:
    return make_layer(border, patch_size, training, **options).float()


def maps(sizes: tuple[int, ...] = (2, 2, 2)) -> list[Tensor]:
    """Maps of so many images; each is routed otherwise."""
    return [scale * torch.randn(size, 3, 7, 6) for size, scale in zip(sizes, (1, 0.1, 3), strict=True)]


# As above, but one by default.
@pytest.mark.usefixtures("compiled_operators")
@pytest.mark.parametrize(
    ("border", "patch_size", "top_k", "training"),
    [pytest.param(*case, marks=[] if case == QUICK[-1] else pytest.mark.slow) for case in CASES],
)
def test_compiled_operators_are_part_of_the_one_graph(border: str, patch_size: int, top_k: int, training: bool) -> None:
    """The graph has the same operators in the same order: sums of its gradients alone may be taken in another one."""
    layer = float32_layer(border, patch_size, training, top_k=top_k, balancing="batch")
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same_steps(layer, compiled, maps(), 1e-4, 1e-5)
    with torch.profiler.profile(acc_events=True) as profile:
        compiled(maps()[0]).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"pcenet::patch_conv2d", "pcenet::patch_conv2d_weight_grad", "pcenet::patch_affine_sums"} <= names


@pytest.mark.usefixtures("compiled_operators")
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_operators_take_any_number_of_images(training: bool) -> None:
    """One graph for all of them, which torch makes when the number changes first."""
    layer = float32_layer("exchange", 2, training)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    batches = [torch.randn(size, 3, 7, 6) for size in (2, 3, 5, 4)]
    assert_same_steps(layer, compiled, batches, 1e-4, 1e-5, warm_up=2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_operators")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("border", ["halo", "exchange"])
def test_compiled_operators_under_inductor(border: str, training: bool) -> None:
    layer = float32_layer(border, 2, training, balancing="batch")
    assert_same_steps(layer, torch.compile(copy.deepcopy(layer), fullgraph=True), maps(), 1e-4, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_operators")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_shortcut_in_float32_under_autocast_and_inductor() -> None:
    """The map that is normalised may be in bfloat16, and what is added to it, and its gradient, in float32."""
    torch.manual_seed(0)
    layer = PCELayer(4, 4, patch_size=2, num_experts=2)
    inputs = [torch.randn(2, 4, 8, 6) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_steps(layer, torch.compile(copy.deepcopy(layer), fullgraph=True), inputs, 3e-2, 3e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_operators")
def test_compiled_operators_under_autocast_and_torch_compile() -> None:
    layer = float32_layer("exchange", 2, True)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_steps(layer, compiled, maps(), 1e-2, 1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [True, False])
def test_under_inductor(training: bool) -> None:
    layer = make_layer("halo", 2, training)
    inputs = [scale * torch.randn(2, 3, 7, 6, dtype=torch.float64) for scale in (1, 0.1, 3)]
    assert_same_steps(layer, torch.compile(copy.deepcopy(layer), fullgraph=True), inputs, 1e-9, 1e-10)


@pytest.mark.parametrize(("border", "top_k"), [("halo", 1), ("exchange", 2)])
def test_an_exported_layer_takes_any_number_of_images(border: str, top_k: int) -> None:
    layer = make_layer(border, 2, False, balancing="batch", top_k=top_k)
    program = torch.export.export(
        layer, (torch.randn(2, 3, 7, 6, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("images")},)
    )
    for images in (1, 2, 5):
        x = torch.randn(images, 3, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_a_temperature_that_changes_compiles_once_more_and_no_more() -> None:
    """A number is a constant to torch.compile until it changes, and then an argument."""
    layer = make_layer("zero", 4, True)
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
    with pytest.raises(ValueError, match=r"temperature=-1\.0 must be a positive number"):
        layer.router.temperature = -1.0
    assert layer.router.temperature == 0.5


class CountingBackend:
    """Runs graphs as they are, and counts those that were made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("pce_nano", 32), ("pce_unet_nano", 64)])
def test_networks_in_float64(name: str, side: int) -> None:
    model = create_network(name, num_classes=4).double()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        compiled.train(training)
        steps = [torch.randn(2, 3, side, side, dtype=torch.float64) for _ in range(3)]
        assert_same_steps(model, compiled, steps, 1e-8, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("pce_")])
def test_every_network_is_one_graph(name: str) -> None:
    model = create_network(name, num_classes=4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        for step in range(2):
            favour(model, step)
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                compiled(torch.randn(2, 3, 64, 64)).sum().backward()
