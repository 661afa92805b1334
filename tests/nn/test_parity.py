"""Layers under routings of all kinds against numbers by hand and against the naive loop, with every gradient."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcenet.nn import Grid, PCELayer, Routing


def make_layer(
    in_channels: int, out_channels: int, *, patch_size: int, num_experts: int, seed: int = 0, **options: Any
) -> PCELayer:
    """A layer whose output is the experts' alone, every tensor of it random."""
    layer = PCELayer(
        in_channels, out_channels, patch_size=patch_size, num_experts=num_experts, shortcut=False, **options
    )
    return reference.randomise(layer.double(), seed)


def make_routing(
    choice: list[list[int]], grid: Grid, num_experts: int, dropped: tuple[tuple[int, int], ...] = ()
) -> Routing:
    """A routing written by hand; its weights are a leaf with a gradient of its own."""
    choices = torch.tensor(choice)
    kept = torch.ones_like(choices, dtype=torch.bool)
    for i, j in dropped:
        kept[i, j] = False
    weight = torch.linspace(0.3, 1.2, choices.numel(), dtype=torch.float64).view_as(choices).requires_grad_()
    logits = torch.zeros(len(choice), num_experts, dtype=torch.float64)
    return Routing(
        logits=logits,
        probs=logits.softmax(dim=1),
        expert_ids=choices,
        gates=weight,
        dispatch_mask=kept,
        capacity=None,  # what is left out is decided by `kept` alone, so that an intervention may set it
        grid=grid,
    )


def naive(layer: PCELayer, x: Tensor, routing: Routing) -> tuple[Tensor, dict[str, Tensor]]:
    weight = [list(row.unbind()) for row in routing.gates]
    return reference.run_experts(
        layer.experts,
        x,
        routing.expert_ids.tolist(),
        weight,
        routing.dispatch_mask.tolist(),
        side=layer.extractor.patch_size,
        border=layer.border,
    )


def check_against_naive(layer: PCELayer, size: tuple[int, int, int], routing: Routing) -> None:
    """Outputs, running statistics and the gradients of the input, the weights of the routing and every parameter."""
    x = torch.randn(size[0], layer.in_channels, *size[1:], dtype=torch.float64, requires_grad=True)
    expected, running = naive(layer, x, routing)
    actual = layer.forward_given_routing(x, routing)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)
    reference.assert_same({k: v for k, v in layer.experts.state_dict().items() if "running" in k}, running)
    tensors = {"x": x, "choice_weight": routing.gates, **dict(layer.experts.named_parameters())}
    direction = torch.randn_like(expected)
    for name, ours, theirs in zip(
        tensors,
        torch.autograd.grad((actual * direction).sum(), list(tensors.values())),
        # The naive loop never touches what it does not need, not even to multiply it by zero.
        torch.autograd.grad(
            (expected * direction).sum() + 0 * sum(t.sum() for t in tensors.values()), list(tensors.values())
        ),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-10, check_stride=False, msg=lambda m, n=name: f"{n}: {m}"
        )


# By hand


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def hand_layer(border: str) -> PCELayer:
    """One channel everywhere, at evaluation, with statistics that leave values alone. Expert 0: the first convolution
    is the identity, the second doubles. Expert 1: the first reads the right neighbour; the second adds the right
    neighbour to the pixel; then 1 is added."""
    options = {"border": border, "shared_kernel": False, "shortcut": False}
    layer = PCELayer(1, 1, patch_size=2, num_experts=3, **options).double()
    experts = layer.experts
    with torch.no_grad():
        for tensor in (experts.conv1.weight, experts.conv2.weight):
            tensor.zero_()
        for norm in (experts.norm1, experts.norm2):
            norm.running_var.fill_(1 - 1e-5)  # the root of variance + eps is 1
        experts.conv1.weight[0, 0, 0, 1, 1] = 1
        experts.conv2.weight[0, 0, 0, 1, 1] = 2
        experts.conv1.weight[1, 0, 0, 1, 2] = 1
        experts.conv2.weight[1, 0, 0, 1, 1] = 1
        experts.conv2.weight[1, 0, 0, 1, 2] = 1
        experts.norm2.bias[1] = 1
    return layer.eval()


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_four_patches_by_hand(border: str) -> None:
    # The map, in patches of 2 x 2:   1 2 | 3 4 | 5 6 | 7 8       experts: 1, 0, 1, 0; the last one is dropped.
    #                                 8 7 | 6 5 | 4 3 | 2 1       expert 2 is idle.
    x = torch.tensor([[[[1.0, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]]], dtype=torch.float64)
    routing = make_routing([[1], [0], [1], [0]], Grid(1, 1, 4), 3, dropped=((3, 0),))
    # Weights .3, .6, .9, 1.2. Write g for gelu.
    g = [gelu(v) for v in range(9)]
    # Patch 1, expert 0, whatever the border: the identity, gelu, times 2.
    doubled = [[2 * g[3], 2 * g[4]], [2 * g[6], 2 * g[5]]]
    # Patches 0 and 2, expert 1. The first convolution shifts by one to the left; what comes in from the right is
    # zero under "zero" and the neighbour's pixel otherwise, also where the neighbour was dropped.
    # zero:    patch 0 activations [[g2, 0], [g7, 0]], plus their right neighbours: the same again.
    # halo:    patch 0 activations [[g2, g3], [g7, g6]], plus the right neighbours, zeros outside the patch.
    # exchange: patch 0 sees patch 1's activations, [[g3, .], [g6, .]]; patch 2 sees zeros: patch 3 was dropped.
    first = {
        "zero": [[g[2], 0], [g[7], 0]],
        "halo": [[g[2] + g[3], g[3]], [g[7] + g[6], g[6]]],
        "exchange": [[g[2] + g[3], g[3] + g[3]], [g[7] + g[6], g[6] + g[6]]],
    }[border]
    third = {
        "zero": [[g[6], 0], [g[3], 0]],
        "halo": [[g[6] + g[7], g[7]], [g[3] + g[2], g[2]]],
        "exchange": [[g[6] + g[7], g[7]], [g[3] + g[2], g[2]]],
    }[border]
    expected = torch.cat(
        [
            0.3 * (reference.float64(first) + 1),
            0.6 * reference.float64(doubled),
            0.9 * (reference.float64(third) + 1),
            torch.zeros(2, 2, dtype=torch.float64),
        ],
        dim=1,
    )
    actual = hand_layer(border).forward_given_routing(x, routing)
    torch.testing.assert_close(actual[0, 0], expected, rtol=0, atol=1e-12, check_stride=False)


def test_batch_statistics_by_hand() -> None:
    """Expert 0 takes the pixels 1 2 3 of a padded map in training: mean 2, variance 2/3, unbiased 1; the running
    values move a tenth of the way from (0, 1): to 0.2 and 1. The others keep theirs."""
    layer = hand_layer("zero").train()
    x = torch.tensor([[[[1.0, 2, 3]]]], dtype=torch.float64)
    layer.forward_given_routing(x, make_routing([[0], [0]], Grid(1, 1, 2), 3))
    norm = layer.experts.norm1
    torch.testing.assert_close(norm.running_mean[:, 0], reference.float64([0.2, 0, 0]))
    started = 1 - 1e-5
    expected = reference.float64([0.9 * started + 0.1 * 1, started, started])
    torch.testing.assert_close(norm.running_var[:, 0], expected)


# One table through everything

# Seven patches of 12 (two images of 2 x 3) to expert 0, one to expert 1, none to expert 2, four to expert 3; three
# are dropped, among them one of image 2.
TABLE = [[0], [3], [0], [0], [0], [1], [3], [0], [3], [0], [0], [3]]
DROPPED = ((3, 0), (8, 0), (10, 0))
TABLE_2 = [[0, 3], [3, 0], [0, 1], [0, 3], [0, 3], [1, 0], [3, 0], [0, 3], [3, 0], [0, 3], [0, 3], [3, 0]]
DROPPED_2 = ((0, 1), (4, 0), (4, 1), (11, 0))
SIZES = {"divisible": (2, 6, 9), "padded": (2, 5, 7)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("border", "top_k"), list(itertools.product(["zero", "halo", "exchange"], [1, 2])))
def test_hand_written_table_equals_the_naive_loop(
    border: str, top_k: int, size: tuple[int, int, int], training: bool
) -> None:
    choice, dropped = (TABLE, DROPPED) if top_k == 1 else (TABLE_2, DROPPED_2)
    layer = make_layer(
        3,
        6,
        patch_size=3,
        num_experts=4,
        hidden_channels=4,
        top_k=top_k,
        border=border,
    ).train(training)
    check_against_naive(layer, size, make_routing(choice, Grid(2, 2, 3), 4, dropped))


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize(
    ("choice", "dropped"),
    [
        pytest.param([[2]] * 12, (), id="all to one"),
        pytest.param([[1], [0]] * 6, tuple((i, 0) for i in range(2, 12)), id="capacity 1"),
        pytest.param([[i % 4] for i in range(12)], (), id="balanced"),
        pytest.param([[3]] * 12, tuple((i, 0) for i in range(12)), id="all dropped"),
    ],
)
def test_extreme_tables_equal_the_naive_loop(
    choice: list[list[int]], dropped: tuple[tuple[int, int], ...], border: str
) -> None:
    layer = make_layer(3, 4, patch_size=3, num_experts=4, border=border)
    check_against_naive(layer, SIZES["padded"], make_routing(choice, Grid(2, 2, 3), 4, dropped))


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_fewer_patches_than_experts(border: str) -> None:
    layer = make_layer(3, 4, patch_size=4, num_experts=9, border=border)
    check_against_naive(layer, (2, 4, 3), make_routing([[7], [2]], Grid(2, 1, 1), 9))


# Few values

# Patches of one real cell each: patch size 1, or a map of one pixel in a patch of 2 x 2. Expert 0 has one value per
# channel, expert 1 has three, expert 2 none.
FEW = {"patch of one pixel": (1, (1, 2, 2), Grid(1, 2, 2)), "one real cell": (2, (4, 1, 1), Grid(4, 1, 1))}


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize(("side", "size", "grid"), FEW.values(), ids=FEW)
def test_no_value_and_one_value_per_channel_in_training(
    side: int, size: tuple[int, int, int], grid: Grid, border: str
) -> None:
    layer = make_layer(3, 4, patch_size=side, num_experts=3, border=border)
    before = {k: v.clone() for k, v in layer.experts.state_dict().items() if "running" in k}
    check_against_naive(layer, size, make_routing([[0], [1], [1], [1]], grid, 3))
    for name, old in before.items():
        new = layer.experts.state_dict()[name]
        assert torch.equal(new[[0, 2]], old[[0, 2]]), f"{name}: experts with 0 or 1 values leave their statistics"
        assert not torch.equal(new[1], old[1])


@pytest.mark.parametrize("padded", [False, True])
def test_two_values_per_channel_are_enough(padded: bool) -> None:
    side, size = (2, (2, 1, 1)) if padded else (1, (2, 1, 1))
    layer = make_layer(3, 4, patch_size=side, num_experts=2, border="zero")
    before = layer.experts.norm1.running_mean.clone()
    check_against_naive(layer, size, make_routing([[1], [1]], Grid(2, 1, 1), 2))
    assert not torch.equal(layer.experts.norm1.running_mean[1], before[1])


# Gradients


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_gradients_exist_and_are_zero_for_the_idle_alone(border: str, size: tuple[int, int, int]) -> None:
    layer = make_layer(3, 4, patch_size=3, num_experts=4, border=border)
    x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
    output = layer.forward_given_routing(x, make_routing(TABLE, Grid(2, 2, 3), 4, DROPPED))
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("shared"):  # by all experts, so that none of them can leave it without
            assert parameter.grad.abs().max() > 1e-8, name
            continue
        largest = parameter.grad.flatten(1).abs().amax(dim=1)
        assert largest[2] == 0, f"{name}: expert 2 has no patches"
        assert (largest[[0, 1, 3]] > 0).all(), f"{name}: the others have some"


# Autograd's corners


def corner_case(border: str) -> tuple[PCELayer, Routing, Tensor]:
    layer = make_layer(3, 4, patch_size=3, num_experts=4, border=border)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    return layer, make_routing(TABLE, Grid(2, 2, 3), 4, DROPPED), x


BORDERS = ["zero", "halo", "exchange"]


@pytest.mark.parametrize("border", BORDERS)
def test_a_kept_graph_gives_its_gradients_twice_and_a_freed_one_says_so(border: str) -> None:
    layer, routing, x = corner_case(border)
    tensors = [x, routing.gates, *layer.experts.parameters()]
    output = layer.forward_given_routing(x, routing)
    direction = torch.randn_like(output)
    expected = torch.autograd.grad((naive(layer, x, routing)[0] * direction).sum(), tensors)
    for keep in (True, True, False):
        for found, right in zip(
            torch.autograd.grad(output, tensors, direction, retain_graph=keep), expected, strict=True
        ):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10, check_stride=False)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, tensors, direction)


@pytest.mark.parametrize("border", BORDERS)
def test_an_input_changed_before_the_backward_pass_never_gives_wrong_gradients(border: str) -> None:
    """Either they are those of the map as it was, of which a copy was read, or autograd says that it changed."""
    layer = make_layer(3, 4, patch_size=3, num_experts=4, border=border)
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64, requires_grad=True)
    routing = make_routing(TABLE, Grid(2, 2, 3), 4)
    (expected,) = torch.autograd.grad(layer.forward_given_routing(x, routing).square().sum(), x)
    own = x.contiguous(memory_format=torch.channels_last)
    output = layer.forward_given_routing(own, routing).square().sum()
    with torch.no_grad():
        own.add_(1)
    with contextlib.suppress(RuntimeError):  # that says so
        output.backward()
    if x.grad is not None:
        torch.testing.assert_close(x.grad, expected, check_stride=False)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    "learning",
    [
        pytest.param(("x", "choice_weight", "norm1", "conv2", "norm2"), id="all but conv1"),
        pytest.param(("x", "choice_weight"), id="frozen experts"),
        pytest.param(("x",), id="input alone"),
        pytest.param(("choice_weight",), id="gate alone"),
        pytest.param(("norm1",), id="a normalisation alone"),
    ],
)
def test_what_is_frozen_has_no_gradient_and_the_rest_the_right_one(learning: tuple[str, ...], border: str) -> None:
    layer, routing, x = corner_case(border)
    tensors = {"x": x, "choice_weight": routing.gates, **dict(layer.experts.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name.startswith(learning))
    expected = naive(layer, x, routing)[0]
    direction = torch.randn_like(expected)
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    right = torch.autograd.grad((expected * direction).sum(), list(wanted.values()), allow_unused=True)
    layer.forward_given_routing(x, routing).backward(direction)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in wanted), name
    for (name, tensor), grad in zip(wanted.items(), right, strict=True):
        torch.testing.assert_close(
            tensor.grad, grad, rtol=1e-9, atol=1e-10, check_stride=False, msg=lambda m, n=name: f"{n}: {m}"
        )


# The host


class DataDependentCalls(TorchDispatchMode):
    """Counts operators that make the host wait for the data, or whose output's shape depends on it."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "_unique",
        "bincount",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(waiting) for waiting in self.WAITING):
            self.calls.append(name)
        if name in ("index", "index_put") and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.calls.append("index by a mask")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every call, from Python or underneath it, that brings values of a tensor to the host."""
    calls: list[str] = []
    names = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
    with monkeypatch.context() as patch, DataDependentCalls() as mode:
        for name in names:
            original = getattr(torch.Tensor, name)

            def counting(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kw: Any) -> Any:
                calls.append(_name)
                return _original(self, *args, **kw)

            patch.setattr(torch.Tensor, name, counting)
        yield calls
    calls += mode.calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
@pytest.mark.parametrize(("border", "top_k"), [("zero", 2), ("halo", 1), ("exchange", 2)])
@pytest.mark.parametrize("height", [8, 7])
def test_no_transfer_to_the_host_in_a_forward_pass(
    height: int,
    border: str,
    top_k: int,
    gate_input: str,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = PCELayer(3, 4, patch_size=4, border=border, top_k=top_k, gate_input=gate_input).train(training)
    x = torch.randn(2, 3, height, 8)
    with counted_transfers(monkeypatch) as calls:
        layer(x)
    assert calls == []


def test_counting_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    with counted_transfers(monkeypatch) as calls:
        values.tolist()
        values.sum().item()
        values[values > 0]
        bool(values.sum() > 0)
    assert {"tolist", "item", "__bool__", "_local_scalar_dense", "index by a mask"} <= set(calls)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("border", "top_k"), [("zero", 2), ("halo", 1), ("exchange", 2)])
@pytest.mark.parametrize("height", [8, 7])
def test_nothing_depends_on_the_data(height: int, border: str, top_k: int, training: bool) -> None:
    """On the meta device there are shapes only: whatever depends on the data fails there."""
    layer = PCELayer(3, 4, patch_size=4, border=border, top_k=top_k)
    layer = layer.to("meta").train(training)
    x = torch.empty(2, 3, height, 8, device="meta", requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (2, 4, height, 8)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None for parameter in layer.parameters())
