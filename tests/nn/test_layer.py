"""The layer against the naive reference, in its limits, and as a module among others."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pcenet.nn import ConvExperts, Grid, PCELayer, aux_loss, record_routing, route


def make_layer(in_channels: int, out_channels: int, *, seed: int = 0, **options: Any) -> PCELayer:
    """A layer in float64, every tensor of it random."""
    return reference.randomise(PCELayer(in_channels, out_channels, **options).double(), seed)


def assert_equals_reference(layer: PCELayer, x: Tensor) -> reference.Reference:
    """Routing, output, running statistics and every gradient."""
    x = x.clone().requires_grad_()
    expected = reference.run_layer(layer, x)
    expected_gradients = reference.gradients(expected.output, x, layer)
    actual, routing = layer.forward_with_routing(x)
    torch.testing.assert_close(routing.logits, expected.logits, rtol=1e-10, atol=1e-10)
    assert routing.expert_ids.tolist() == expected.choice
    assert routing.dispatch_mask.tolist() == expected.kept
    assert routing.expert_counts.tolist() == expected.load
    assert routing.capacity == expected.capacity
    torch.testing.assert_close(actual, expected.output, rtol=1e-10, atol=1e-10, check_stride=False)
    running = {k: v for k, v in layer.experts.state_dict().items() if "running" in k}
    reference.assert_same(running, expected.running)
    reference.assert_same(reference.gradients(actual, x, layer), expected_gradients)
    return expected


# The whole grid of options against the reference

# B, C_in, C_out, hidden, H, W, S. They take turns along the grid of options.
SHAPES = [
    (2, 4, 4, None, 8, 8, 4),
    (2, 3, 6, 4, 7, 5, 3),
    (1, 4, 4, None, 2, 3, 4),
    (3, 3, 4, 12, 4, 4, 2),
    (2, 5, 5, 3, 3, 4, 1),
    (2, 6, 6, None, 9, 4, 4),
    (1, 3, 3, 8, 5, 5, 2),
]
OPTIONS = [
    dict(zip(("border", "gate", "gate_input", "shared_kernel", "top_k"), values, strict=True))
    for values in itertools.product(
        ("zero", "halo", "exchange"),
        ("prob", "affinity", "straight_through"),
        ("pixels", "flat"),
        (True, False),
        (1, 2),
    )
]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        pytest.param(options, shape, id="-".join(map(str, (*options.values(), *shape))))
        for options, shape in zip(2 * OPTIONS, itertools.cycle(SHAPES))
    ],
)
def test_layer_equals_the_reference(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    batch, in_channels, out_channels, hidden, height, width, side = shape
    layer = make_layer(
        in_channels,
        out_channels,
        hidden_channels=hidden,
        patch_size=side,
        num_experts=3,
        num_bands=2,
        router_hidden=5,
        capacity_factor=0.8,
        eval_capacity_factor=None if batch == 2 else 0.7,
        **options,
    )
    x = torch.randn(batch, in_channels, height, width, dtype=torch.float64)
    assert_equals_reference(layer, x)
    assert_equals_reference(layer.eval(), x)


def test_each_pair_of_options_meets_each_shape() -> None:
    assert len(OPTIONS) == 72
    for names in itertools.combinations(OPTIONS[0], 2):
        met = {(*(o[n] for n in names), shape) for o, shape in zip(2 * OPTIONS, itertools.cycle(SHAPES))}
        combinations = {tuple(o[n] for n in names) for o in OPTIONS}
        assert len(met) == len(combinations) * len(SHAPES), names


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["zero", "halo", "exchange"]),
    st.booleans(),
)
def test_any_shape_equals_the_reference(
    batch: int, height: int, width: int, side: int, experts: int, border: str, training: bool
) -> None:
    layer = make_layer(
        2,
        3,
        patch_size=side,
        num_experts=experts,
        border=border,
        num_bands=1,
        router_hidden=3,
    ).train(training)
    assert_equals_reference(layer, torch.randn(batch, 2, height, width, dtype=torch.float64))


def test_statistics_over_several_steps_equal_the_reference() -> None:
    layer = make_layer(3, 3, patch_size=2, num_experts=3)
    for size in ((4, 4), (5, 3), (4, 4)):
        assert_equals_reference(layer, torch.randn(2, 3, *size, dtype=torch.float64))
    assert_equals_reference(layer.eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64))


# Limits


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 4), (3, 5)])
def test_a_dropped_patch_gets_exactly_the_shortcut(in_channels: int, out_channels: int, border: str) -> None:
    layer = PCELayer(in_channels, out_channels, patch_size=2, border=border, capacity_factor=0.5)
    x = torch.randn(2, in_channels, 5, 6)
    output, routing = layer.forward_with_routing(x)
    shortcut = layer.extractor.split(layer.shortcut(x))[0]
    patches = layer.extractor.split(output)[0]
    kept = routing.dispatch_mask[:, 0]
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(patches[~kept], shortcut[~kept])
    assert (patches[kept] - shortcut[kept]).abs().amax(dim=(1, 2, 3)).min() > 0


def test_a_dropped_patch_without_a_shortcut_gets_exactly_zero() -> None:
    layer = PCELayer(3, 4, patch_size=2, capacity_factor=0.5, top_k=2, shortcut=False)
    assert layer.shortcut is None
    output, routing = layer.forward_with_routing(torch.randn(2, 3, 6, 6))
    patches = layer.extractor.split(output)[0]
    lost = ~routing.dispatch_mask.any(dim=1)
    assert lost.any()
    assert (patches[lost] == 0).all()


def test_the_shortcut_is_the_input_or_a_convolution_of_one_pixel() -> None:
    assert isinstance(PCELayer(4, 4, patch_size=2).shortcut, nn.Identity)
    shortcut = PCELayer(4, 6, patch_size=2).shortcut
    assert isinstance(shortcut, nn.Conv2d)
    assert shortcut.kernel_size == (1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_on_one_patch_is_a_dense_block(training: bool) -> None:
    """Gate value 1 and a patch as large as the map: the double convolution, its statistics and all its gradients."""
    layer = make_layer(
        3,
        4,
        patch_size=6,
        num_experts=1,
        border="zero",
        gate="straight_through",
        shared_kernel=False,
        shortcut=False,
    ).train(training)
    block = layer.experts.to_sequential(0)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), block(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, check_stride=False)
    of_block = reference.gradients(theirs, x, block)
    of_layer = reference.gradients(ours, x, layer)
    for name, in_block in {"conv1": "0", "norm1": "1", "conv2": "4", "norm2": "5"}.items():
        torch.testing.assert_close(of_layer[f"experts.{name}.weight"][0], of_block[f"{in_block}.weight"])
    torch.testing.assert_close(of_layer["x"], of_block["x"], check_stride=False)
    reference.assert_same(
        layer.experts.to_sequential(0).state_dict() | {"1.num_batches_tracked": 0, "5.num_batches_tracked": 0},
        block.state_dict() | {"1.num_batches_tracked": 0, "5.num_batches_tracked": 0},
    )


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2), (1, 1), (13, 5)])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_exchange_with_equal_experts_is_a_whole_map_block(side: int, size: tuple[int, int]) -> None:
    """With frozen statistics and gate value 1, at any size: no seam is left between patches. In float32 to five digits
    of the largest value: a product of sums of the inputs, as in Winograd's algorithm, rounds at their scale."""
    options = {"gate": "straight_through", "shared_kernel": False, "shortcut": False}  # kernels as they are, unrounded
    layer = PCELayer(4, 4, patch_size=side, border="exchange", **options)
    block = reference.randomise(ConvExperts(4, 4, 1)).to_sequential(0).eval()
    for e in range(4):
        layer.experts.from_sequential(e, block)
    layer.eval()
    x = torch.randn(2, 4, *size)
    _, routing = layer.forward_with_routing(x)
    expected = block(x)
    assert (layer(x) - expected).abs().max() <= 5e-6 * expected.abs().max()
    torch.testing.assert_close(
        layer.double()(x.double()), block.double()(x.double()), rtol=1e-10, atol=1e-10, check_stride=False
    )
    if size == (8, 8) and side < 4:
        assert (routing.expert_counts > 0).sum() > 1, "a routing to one expert would prove little"


@pytest.mark.parametrize("border", ["zero", "halo"])
def test_other_borders_show_seams(border: str) -> None:
    """What `exchange` is for: the same experts differ from the whole-map block, on the patches' edges alone."""
    layer = make_layer(3, 3, patch_size=6, num_experts=1, border=border, gate="straight_through", shortcut=False).eval()
    block = layer.experts.to_sequential(0)
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    difference = (layer(x) - block(x)).abs().amax(dim=(0, 1))
    reach = 2 if border == "zero" else 1  # pixels from an inner edge whose taps fell outside the patch
    inside = torch.ones(12, 12, dtype=torch.bool)
    inside[6 - reach : 6 + reach] = False
    inside[:, 6 - reach : 6 + reach] = False
    assert difference[inside].max() < 1e-12
    assert difference[~inside].min() > 1e-9


@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_logits(top_k: int) -> None:
    """A router that cannot decide: whoever is chosen among equals, the experts do as they are told."""
    layer = make_layer(3, 4, patch_size=2, top_k=top_k, capacity_factor=0.5, shortcut=False)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    actual, routing = layer.forward_with_routing(x)
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
    weight = [[torch.tensor(0.25, dtype=torch.float64)] * top_k] * 12
    fresh = make_layer(3, 4, patch_size=2)
    expected, _ = reference.run_experts(
        fresh.experts, x, routing.expert_ids.tolist(), weight, routing.dispatch_mask.tolist(), side=2, border="halo"
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)


# What it promises about batches


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prediction_does_not_depend_on_its_batch(dtype: torch.dtype, border: str) -> None:
    layer = make_layer(3, 4, patch_size=2, border=border).to(dtype).eval()
    x = torch.randn(3, 3, 7, 6, dtype=dtype)
    logits = layer.router(x).logits
    first, second = logits.topk(2).values.unbind(1)
    assert (first - second).min() > 1e-4, "routing is discontinuous: the sample must not sit on a border"
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=tolerance, atol=tolerance, check_stride=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_permuting_the_images_permutes_the_outputs(border: str, training: bool) -> None:
    """Also in training with dropping: by gate value, nobody's place in the batch matters."""
    layer = make_layer(3, 4, patch_size=2, border=border, capacity_factor=0.6).train(training)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-10, atol=1e-10, check_stride=False)


# Precision, memory formats, modes


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize("half_input", [False, True])
@pytest.mark.parametrize("height", [8, 7])
def test_bfloat16_autocast(height: int, half_input: bool, border: str) -> None:
    """The same routing to the bit, and errors of bfloat16's size: each rounding is one of 2^-9 at most, and an output
    or a gradient passes through a handful of them."""
    layer = PCELayer(8, 8, patch_size=4, border=border, shortcut=False)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 8, height, 8)
    x = (x.bfloat16() if half_input else x).requires_grad_()
    expected, expected_routing = twin.forward_with_routing(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, routing = layer.forward_with_routing(x)
    assert torch.equal(routing.logits, expected_routing.logits)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.02
    of_layer = reference.gradients(actual.float(), x, layer)
    of_twin = reference.gradients(expected, x, twin)
    # Zero but for rounding: balancing takes away what all patches share.
    assert of_layer.pop("router.logits.bias").abs().max() < 1e-4 * of_layer["router.logits.weight"].abs().max()
    for name, gradient in of_layer.items():
        assert torch.isfinite(gradient).all(), name
        assert relative_error(gradient.float(), of_twin[name].float()) < 0.05, name
        assert gradient.dtype == (x.dtype if name == "x" else torch.float32), name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_memory_format_changes_nothing(size: tuple[int, int], border: str) -> None:
    layer = make_layer(4, 6, patch_size=4, border=border)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    contiguous = x.clone().requires_grad_()
    channels_last = x.clone(memory_format=torch.channels_last).requires_grad_()
    first, second = layer(contiguous), twin(channels_last)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10, check_stride=False)
    reference.assert_same(
        reference.gradients(second, channels_last, twin), reference.gradients(first, contiguous, layer)
    )


def test_a_view_that_is_not_contiguous_is_fine() -> None:
    layer = make_layer(3, 3, patch_size=2).eval()
    x = torch.randn(2, 6, 10, 5, dtype=torch.float64)
    view = x[:, ::2, 1:9:2].transpose(2, 3)
    torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=1e-10, atol=1e-10, check_stride=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_without_gradients(border: str, mode: Any) -> None:
    layer = make_layer(3, 4, patch_size=2, border=border).eval()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with mode():
        output = layer(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, layer(x).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_evaluation_is_the_same_where_somebody_looks(border: str, top_k: int) -> None:
    """Where nobody does, convolution and normalisation are one operator."""
    layer = make_layer(3, 4, patch_size=2, border=border, top_k=top_k).eval()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        for part in (layer.experts.norm1, layer.experts.norm2, layer.experts.drop):
            handle = part.register_forward_hook(lambda *_: None)
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
            handle.remove()


@pytest.mark.parametrize("training", [True, False])
def test_input_is_left_alone(training: bool) -> None:
    layer = make_layer(3, 3, patch_size=2, border="exchange").train(training)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("border", ["zero", "halo", "exchange"])
def test_dropout_acts_in_training_alone(border: str) -> None:
    layer = make_layer(3, 4, patch_size=2, border=border, dropout=0.4)
    without = make_layer(3, 4, patch_size=2, border=border)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert (layer(x) - layer(x)).abs().max() > 1e-3
    layer.load_state_dict(without.state_dict())
    torch.testing.assert_close(layer.eval()(x), without.eval()(x), rtol=0, atol=0)


# A module among others


def test_deepcopy_is_independent() -> None:
    layer = make_layer(3, 4, patch_size=2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    with torch.no_grad():
        for parameter in twin.experts.conv1.parameters():
            parameter.zero_()
    assert layer.experts.conv1.weight.abs().min() > 0


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_state_dict_round_trip(gate_input: str) -> None:
    options = {"patch_size": 2, "gate_input": gate_input}
    layer, other = make_layer(3, 4, **options), make_layer(3, 4, seed=1, **options)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    layer(x)
    assert not torch.equal(layer.eval()(x), other.eval()(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_parameter_names_are_a_contract() -> None:
    layer = PCELayer(3, 4, patch_size=2, num_experts=5, hidden_channels=6, num_bands=2, router_hidden=7)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "experts.conv1.shared": (6, 3, 3, 3),
        "experts.conv1.difference": (5, 6, 3, 3, 3),
        "experts.norm1.weight": (5, 6),
        "experts.norm1.bias": (5, 6),
        "experts.conv2.shared": (4, 6, 3, 3),
        "experts.conv2.difference": (5, 4, 6, 3, 3),
        "experts.norm2.weight": (5, 4),
        "experts.norm2.bias": (5, 4),
        "router.hidden.weight": (7, 3 + 16, 1, 1),
        "router.hidden.bias": (7,),
        "router.logits.weight": (5, 7),
        "router.logits.bias": (5,),
        "shortcut.weight": (4, 3, 1, 1),
    }
    assert {name for name, _ in layer.named_buffers()} == {"router.expert_bias", "router.centring"} | {
        f"experts.{norm}.{which}"
        for norm in ("norm1", "norm2")
        for which in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_state_does_not_depend_on_how_the_layer_runs() -> None:
    """Border, gate and capacity are no part of the weights."""
    layer = make_layer(3, 4, patch_size=2)
    others = {"border": "exchange", "gate": "straight_through"}
    PCELayer(3, 4, patch_size=2, capacity_factor=None, **others).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_another_image_size_than_it_was_trained_on(gate_input: str) -> None:
    layer = make_layer(3, 3, patch_size=3, gate_input=gate_input)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(torch.randn(2, 3, 6, 6, dtype=torch.float64)).square().mean().backward()
    optimiser.step()
    for size in ((11, 4), (3, 3), (2, 7)):
        assert_equals_reference(layer.eval(), torch.randn(1, 3, *size, dtype=torch.float64))


def test_training_in_a_sequential_reduces_the_loss() -> None:
    model = nn.Sequential(PCELayer(3, 6, patch_size=4), PCELayer(6, 3, patch_size=2))
    x, target = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        with record_routing(model) as records:
            loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        (loss + aux_loss(records)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_forward_is_made_of_the_public_parts() -> None:
    layer = make_layer(3, 4, patch_size=2).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    output, routing = layer.forward_with_routing(x)
    assert torch.equal(output, layer(x))
    assert torch.equal(routing.logits, layer.router(x).logits)
    assert torch.equal(layer.forward_given_routing(x, routing), output)
    elsewhere = route(-routing.logits, Grid(*routing.grid))
    assert not torch.equal(layer.forward_given_routing(x, elsewhere), output)


def test_the_signature_is_a_contract() -> None:
    """What a user may leave out, and what it then is."""
    parameters = dict(inspect.signature(PCELayer).parameters)
    assert [parameters.pop(name).default for name in ("in_channels", "out_channels", "patch_size")] == (
        [inspect.Parameter.empty] * 3
    )
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "num_experts": 4,
        "hidden_channels": None,
        "top_k": 1,
        "capacity_factor": 1.25,
        "eval_capacity_factor": None,
        "border": "halo",
        "gate": "prob",
        "gate_input": "pixels",
        "num_bands": 4,
        "router_hidden": None,
        "balancing": "batch",
        "dropout": 0.0,
        "shared_kernel": True,
        "shortcut": True,
    }


def test_options_reach_the_parts() -> None:
    """The reference reads a layer's options off its parts, so that one that never arrived would go unseen there."""
    layer = PCELayer(
        4,
        4,
        patch_size=3,
        capacity_factor=0.5,
        eval_capacity_factor=2.0,
        gate="straight_through",
        gate_input="flat",
        num_bands=2,
        balancing="none",
    )
    router = layer.router
    assert router.expert_bias is None
    assert (router.capacity_factor, router.eval_capacity_factor) == (0.5, 2.0)
    assert (router.gate, router.gate_input) == ("straight_through", "flat")
    assert (layer.extractor.patch_size, router.patch_size) == (3, 3)
    enriched = layer.extractor(torch.randn(1, 4, 6, 6))
    assert enriched.shape[1] == router.hidden.in_channels == 4 + 8 * 2, "the extractor builds what the router is for"


# Wrong use


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"patch_size": -2}, "patch_size=-2"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 5}, "top_k=5"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": -1.25}, "capacity_factor=-1.25"),
        ({"capacity_factor": math.nan}, "capacity_factor=nan"),
        ({"eval_capacity_factor": 0.0}, "eval_capacity_factor=0.0"),
        ({"border": "same"}, "border='same'"),
        ({"gate": "hard"}, "gate='hard'"),
        ({"gate_input": "mean"}, "gate_input='mean'"),
        ({"num_bands": -1}, "num_bands=-1"),
        ({"router_hidden": 0}, "router_hidden=0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], name: str) -> None:
    arguments = {"in_channels": 4, "out_channels": 4, "patch_size": 2} | options
    with pytest.raises(ValueError, match=re.escape(name)):
        PCELayer(**arguments)


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 3, 8, 8), (0, 4, 8, 8), (2, 4, 0, 8), (2, 4, 8, 8, 1)])
def test_a_wrong_input_is_described(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        PCELayer(4, 4, patch_size=2)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 8, 8)])
def test_a_routing_of_another_map_is_refused(shape: tuple[int, ...]) -> None:
    layer = PCELayer(3, 3, patch_size=4)
    _, routing = layer.forward_with_routing(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"and its routing is for Grid\(batch=1, rows=2, columns=2\)"):
        layer.forward_given_routing(torch.randn(shape), routing)


# What is added


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_given_to_be_added_is_added(training: bool, top_k: int, shortcut: bool) -> None:
    layer = make_layer(3, 3, patch_size=2, top_k=top_k, shortcut=shortcut, border="exchange").train(training)
    x, residual = torch.randn(2, 2, 3, 5, 6, dtype=torch.float64).unbind(0)
    for tensor in (x, residual):
        tensor.requires_grad_()
    twin = copy.deepcopy(layer)
    plain, added = twin(x), layer(x, residual)
    torch.testing.assert_close(added, residual + plain, rtol=1e-12, atol=1e-12, check_stride=False)
    direction = torch.randn_like(plain)
    (of_residual,) = torch.autograd.grad((added * direction).sum(), residual)
    torch.testing.assert_close(of_residual, direction, check_stride=False)
