"""Selection rules on hand-written tables, and the router against the perceptron on the enriched patches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcenet.nn import Grid, PatchExtractor, Router, Routing, load_balance_loss, route, z_loss
from pcenet.nn.routing import select_within_capacity


def table(rows: list[list[float]], **options: object) -> Routing:
    """Route one row of patches by a table of probabilities."""
    logits = torch.tensor(rows, dtype=torch.float64).log()
    return route(logits, Grid(1, 1, len(rows)), **options)


def random_router(*args: int, **options: object) -> Router:
    return reference.randomise(nn.ModuleDict({"router": Router(*args, **options)}).double())["router"]


# Capacity


@pytest.mark.parametrize(
    ("factor", "patches", "experts", "top_k", "capacity"),
    [
        (1.25, 16, 4, 1, 5),  # 5
        (1.25, 8, 4, 1, 3),  # 2.5
        (1.0, 6, 4, 1, 2),  # 1.5
        (1.0, 6, 4, 2, 3),  # 3
        (0.5, 3, 4, 2, 1),  # 0.75
        (1.0, 1, 8, 1, 1),  # 0.125
        (2.0, 10, 4, 1, 5),  # 5
        (1.25, 9, 4, 2, 6),  # 5.625
    ],
)
def test_capacity_is_the_ceiling_of_the_formula(
    factor: float, patches: int, experts: int, top_k: int, capacity: int
) -> None:
    routing = route(torch.zeros(patches, experts), Grid(patches, 1, 1), top_k=top_k, capacity_factor=factor)
    assert routing.capacity == capacity
    assert routing.dispatched_counts.max() <= capacity


# Who is dropped

# Expert 0 is wanted by the patches 0, 1, 2, 4 with .9, .6, .8, .6; expert 1 by patch 3.
FIVE = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]


@pytest.mark.parametrize(
    ("factor", "capacity", "kept"),
    [
        (0.4, 1, [1, 0, 0, 1, 0]),
        (0.8, 2, [1, 0, 1, 1, 0]),  # .9 and .8 stay
        (1.2, 3, [1, 1, 1, 1, 0]),  # patches 1 and 4 have .6 both: the later goes
        (1.6, 4, [1, 1, 1, 1, 1]),
        (None, None, [1, 1, 1, 1, 1]),
    ],
)
def test_dropping_one_expert_per_patch(factor: float | None, capacity: int | None, kept: list[int]) -> None:
    routing = table(FIVE, capacity_factor=factor)
    assert routing.capacity == capacity
    assert routing.expert_ids[:, 0].tolist() == [0, 0, 0, 1, 0]
    assert routing.dispatch_mask[:, 0].tolist() == [bool(k) for k in kept]
    assert routing.expert_counts.tolist() == [4, 1], "load is counted before dropping"
    assert routing.dispatched_counts.tolist() == [sum(kept) - 1, 1]


# Two experts per patch. Expert 0 is the second choice of patch 0 (.2) and the first of patches 1 (.5) and 2 (.6).
THREE = [[0.2, 0.7, 0.1], [0.5, 0.1, 0.4], [0.6, 0.3, 0.1]]


def test_dropping_two_experts_per_patch() -> None:
    routing = table(THREE, top_k=2, capacity_factor=0.9)
    assert routing.capacity == 2  # 0.9 * 3 * 2 / 3 = 1.8
    assert routing.expert_ids.tolist() == [[1, 0], [0, 2], [0, 1]]
    assert routing.dispatch_mask.int().tolist() == [[1, 0], [1, 1], [1, 1]]  # expert 0 lets .2 go
    assert routing.expert_counts.tolist() == [3, 2, 1]
    assert routing.expert_counts.dtype == torch.int64


def test_ties_between_choices_drop_the_later_patch() -> None:
    # All gate values are .4 or .3, so everything is decided by the number of the patch.
    routing = table([[0.4, 0.3, 0.3 - 1e-9], [0.4, 0.3, 0.3 - 1e-9]], top_k=2, capacity_factor=0.5)
    assert routing.capacity == 1
    assert routing.dispatch_mask.tolist() == [[True, True], [False, False]]


def test_many_equal_gates_keep_the_first() -> None:
    """More pairs than a sort treats as a small case, so that an unstable one would show."""
    logits = torch.zeros(3000, 2, dtype=torch.float64)
    logits[:, 0] = 1
    routing = route(logits, Grid(3000, 1, 1), capacity_factor=0.5)
    assert routing.dispatch_mask[:, 0].tolist() == [True] * 750 + [False] * 2250


def test_nothing_is_dropped_while_the_busiest_expert_has_room() -> None:
    choice = torch.tensor([[0], [1], [0], [1], [1]])
    gate = torch.tensor([[0.9], [0.8], [0.7], [0.5], [0.6]])
    assert select_within_capacity(choice, gate, 3).flatten().tolist() == [True] * 5
    assert select_within_capacity(choice, gate, 2).flatten().tolist() == [True, True, True, False, True]
    nobody = select_within_capacity(choice[:0], gate[:0], 0)
    assert nobody.shape == (0, 1)
    assert nobody.dtype == torch.bool


def test_capacity_asks_no_number_of_tensors_that_have_none() -> None:
    with FakeTensorMode():
        choice = torch.zeros(6, 1, dtype=torch.int64)
        kept = select_within_capacity(choice, torch.zeros(6, 1), 2)
    assert kept.shape == (6, 1)


def test_choice_by_choice_by_hand() -> None:
    routing = table(THREE, top_k=2, capacity_factor=0.9)
    expert, gate = routing.by_choice
    # First choices 1, 0, 0; second ones 0 (dropped), 2, 1.
    assert expert.tolist() == [1, 0, 0, -1, 2, 1]
    torch.testing.assert_close(gate, reference.float64([0.7, 0.5, 0.6, 0.2, 0.4, 0.3]))
    assert routing.dispatched_counts.tolist() == [2, 2, 1]
    assert (routing.num_experts, routing.top_k) == (3, 2)


def test_routing_is_frozen() -> None:
    routing = table(FIVE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.dispatch_mask = torch.zeros_like(routing.dispatch_mask)


@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(0.1, 2),
    st.booleans(),
)
def test_any_table_is_routed_like_the_naive_loops(
    patches: int, experts: int, top_k: int, factor: float, coarse: bool
) -> None:
    top_k = min(top_k, experts)
    logits = torch.randn(patches, experts, dtype=torch.float64)
    if coarse:  # ties between patches, none within one
        logits = logits.argsort(dim=1).argsort(dim=1).double()
    routing = route(logits, Grid(patches, 1, 1), top_k=top_k, capacity_factor=factor)
    choice = reference.choose(logits, top_k)
    gate = routing.probs.gather(1, torch.tensor(choice)).tolist()
    assert routing.expert_ids.tolist() == choice
    assert routing.dispatch_mask.tolist() == reference.keep(choice, gate, experts, routing.capacity)
    assert routing.expert_counts.sum() == patches * top_k
    torch.testing.assert_close(routing.probs, reference.softmax(logits))


# Gate values

LOGITS = [5.0, 3.0, 2.0]  # probabilities .5, .3, .2 after the logarithm


@pytest.mark.parametrize(
    ("gate", "top_k", "values"),
    [
        ("prob", 1, [0.5]),
        ("prob", 2, [0.5, 0.3]),
        ("affinity", 1, [0.5]),
        ("straight_through", 1, [1.0]),
        ("straight_through", 2, [0.625, 0.375]),
        ("straight_through", 3, [0.5, 0.3, 0.2]),
    ],
)
def test_gate_values_and_gradients_by_hand(gate: str, top_k: int, values: list[float]) -> None:
    logits = torch.tensor([LOGITS], dtype=torch.float64).log().requires_grad_()
    routing = route(logits, Grid(1, 1, 1), top_k=top_k, gate=gate)
    torch.testing.assert_close(routing.gates, reference.float64([values]))
    # Whatever the value, the gradient is that of p_i: dp_i/dl_j = p_i ((i = j) - p_j).
    jacobian = [[0.25, -0.15, -0.10], [-0.15, 0.21, -0.06], [-0.10, -0.06, 0.16]]
    for i in range(top_k):
        (gradient,) = torch.autograd.grad(routing.gates[0, i], logits, retain_graph=True)
        torch.testing.assert_close(gradient, reference.float64([jacobian[i]]))


def test_straight_through_is_exactly_one() -> None:
    """A converted network starts unchanged only if the factor is 1 to the last bit."""
    routing = route(torch.randn(200, 5), Grid(200, 1, 1), gate="straight_through")
    assert (routing.gates == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_affinity_is_the_probability_without_the_balancing_bias(dtype: torch.dtype) -> None:
    """At evaluation, where one operator computes logits in float32: the bias decides who is chosen, not how much."""
    router = reference.randomise(Router(3, 2, 4, gate="affinity").double()).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    affinities = reference.softmax(reference.perceptron_logits(router, x))
    choice = reference.choose(reference.router_logits(router, x), 1)
    routing = router.to(dtype)(x.to(dtype))
    assert routing.expert_ids.tolist() == choice != reference.choose(affinities, 1)
    torch.testing.assert_close(routing.gates.double(), affinities.gather(1, torch.tensor(choice)), rtol=1e-5, atol=1e-6)


# The router

SHAPES = [(2, 3, 8, 8, 4), (2, 3, 7, 5, 3), (1, 5, 2, 3, 4), (3, 2, 4, 6, 1), (1, 4, 9, 4, 4)]


@pytest.mark.parametrize("gate_input", ["pixels", "flat", "position"])
@pytest.mark.parametrize("num_bands", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_router_equals_the_perceptron_on_enriched_patches(
    shape: tuple[int, ...], num_bands: int, gate_input: str
) -> None:
    batch, channels, height, width, side = shape
    router = random_router(channels, side, 4, num_bands=num_bands, gate_input=gate_input, hidden=6)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    actual, expected = router(x).logits, reference.router_logits(router, x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    reference.assert_same(reference.gradients(actual, x, router), reference.gradients(expected, x, router), rtol=1e-9)


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_router_equals_the_perceptron_on_the_extractors_output(gate_input: str) -> None:
    """The enriched tensor that is never built is the one that `PatchExtractor` builds."""
    router = random_router(3, 4, 5, gate_input=gate_input, hidden=8)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    enriched = PatchExtractor(4)(x)
    if gate_input == "flat":
        hidden = reference.gelu(enriched.flatten(1) @ router.hidden.weight.flatten(1).T + router.hidden.bias)
    else:
        pixels = enriched.permute(0, 2, 3, 1) @ router.hidden.weight[:, :, 0, 0].T + router.hidden.bias
        hidden = reference.gelu(pixels).mean(dim=(1, 2))
    expected = hidden @ router.logits.weight.T + router.logits.bias
    torch.testing.assert_close(router.compute_logits(x), expected, rtol=1e-10, atol=1e-10)


class _Third(Router):
    """Logits of its own."""

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(x) * 0 + torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize("training", [True, False])
def test_a_router_may_have_logits_of_its_own(training: bool) -> None:
    x = torch.randn(2, 3, 4, 4)
    of_class, of_instance = _Third(3, 2, 3, balancing="none"), Router(3, 2, 3, balancing="none")
    of_instance.compute_logits = lambda x: torch.tensor([[0.0, 1.0, 2.0]]).expand(8, 3)  # type: ignore[method-assign] # what is tested
    for router in (of_class, of_instance):
        assert router.train(training)(x).expert_ids.flatten().tolist() == [2] * 8


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_position_alone_can_route(gate_input: str) -> None:
    """On an empty image the content says nothing: the patches differ by both kinds of position, or not at all."""
    router = random_router(2, 2, 3, gate_input=gate_input)
    logits = router(torch.zeros(1, 2, 8, 8, dtype=torch.float64)).logits
    distances = torch.cdist(logits, logits) + torch.eye(16)
    assert distances.min() > 1e-3
    blind = random_router(2, 2, 3, gate_input=gate_input, num_bands=0)
    assert blind(torch.zeros(1, 2, 8, 8, dtype=torch.float64)).logits.std(dim=0).max() < 1e-12


@pytest.mark.parametrize("axis", [2, 3])
def test_pixels_router_uses_the_position_inside_the_patch(axis: int) -> None:
    """Turning a patch round changes which pixel lies where, and so the logits, though the mean pixel stays."""
    router = random_router(2, 4, 3)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert (router(x).logits - router(x.flip(axis)).logits).abs().max() > 1e-3


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_an_images_routing_does_not_depend_on_its_batch(gate_input: str) -> None:
    router = random_router(3, 2, 4, gate_input=gate_input).eval()
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    whole = router(x)
    alone = router(x[2:3])
    per_image = 3 * 3
    torch.testing.assert_close(alone.logits, whole.logits[2 * per_image : 3 * per_image], rtol=1e-12, atol=1e-12)
    order = torch.tensor([3, 1, 0, 2])
    permuted = router(x[order]).logits.unflatten(0, (4, per_image))
    torch.testing.assert_close(permuted, whole.logits.unflatten(0, (4, per_image))[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "width"), [(3, 16), (64, 16), (96, 24), (256, 64), (512, 64)])
def test_width_is_a_quarter_of_the_channels_within_16_and_64(channels: int, width: int) -> None:
    assert Router(channels, 2, 4).hidden.out_channels == width


def test_evaluation_drops_nothing_unless_told() -> None:
    x = torch.randn(4, 3, 8, 8)
    router = Router(3, 2, 4, capacity_factor=0.5)
    training = router(x)
    assert training.capacity == math.ceil(0.5 * 64 / 4)
    assert not training.dispatch_mask.all()
    evaluation = router.eval()(x)
    assert evaluation.capacity is None
    assert evaluation.dispatch_mask.all()
    limited = Router(3, 2, 4, capacity_factor=None, eval_capacity_factor=0.25)
    assert limited(x).capacity is None
    assert limited(x).dispatch_mask.all()
    assert limited.eval()(x).capacity == 4
    assert not limited(x).dispatch_mask.all()


def test_fields_have_fixed_shapes_and_dtypes() -> None:
    routing = Router(3, 4, 5, top_k=2)(torch.randn(2, 3, 9, 8))
    shapes = {name: tuple(value.shape) for name, value in vars(routing).items() if isinstance(value, Tensor)}
    assert shapes == {
        "logits": (12, 5),
        "probs": (12, 5),
        "expert_ids": (12, 2),
        "gates": (12, 2),
        "dispatch_mask": (12, 2),
    }
    assert routing.grid == Grid(2, 3, 2)
    assert routing.capacity == 6
    assert (routing.expert_ids.dtype, routing.dispatch_mask.dtype) == (torch.int64, torch.bool)


# Precision


@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_router_computes_in_float32_under_autocast(gate_input: str) -> None:
    router = Router(3, 4, 4, gate_input=gate_input)
    x = torch.randn(2, 3, 8, 8)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router(x)
        from_bfloat16 = router(x.bfloat16())
    assert actual.logits.dtype == actual.probs.dtype == actual.gates.dtype == torch.float32
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(from_bfloat16.logits, router(x.bfloat16().float()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gate_input", ["pixels", "flat"])
def test_float64_stays_float64(gate_input: str, autocast: bool) -> None:
    router = random_router(3, 4, 4, gate_input=gate_input)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x)
    assert routing.logits.dtype == routing.probs.dtype == torch.float64
    torch.testing.assert_close(routing.logits, reference.router_logits(router, x), rtol=1e-10, atol=1e-10)


# Temperature and perturbation


def test_temperature_shapes_probabilities_and_balance_but_neither_choice_nor_z() -> None:
    # Logits (ln 9, 0): 0.9 and 0.1 at temperature 1; at 2 they are (ln 3, 0): 0.75 and 0.25.
    logits = torch.tensor([[math.log(9), 0.0]], dtype=torch.float64)
    for temperature, first in ((1.0, 0.9), (2.0, 0.75)):
        routing = route(logits, Grid(1, 1, 1), temperature=temperature)
        assert routing.expert_ids.tolist() == [[0]]
        assert routing.probs.tolist() == [pytest.approx([first, 1 - first])]
        assert routing.gates.item() == pytest.approx(first)
        assert load_balance_loss(routing).item() == pytest.approx(2 * first)  # E * (p_0 * 1 + p_1 * 0)
        assert z_loss(routing).item() == pytest.approx(math.log(10) ** 2)  # logsumexp of (ln 9, 0)


def test_a_routers_temperature_holds_in_training_and_at_evaluation() -> None:
    router = Router(3, 4, 16, temperature=5.0)  # so many that the last line is exact
    x = torch.randn(2, 3, 8, 8)
    for module in (router, router.eval()):
        routing = module(x)
        torch.testing.assert_close(routing.probs, (routing.logits / 5).softmax(dim=1))
    router.temperature = 1.0
    assert torch.equal(router(x).probs, routing.logits.softmax(dim=1))


@pytest.mark.parametrize("experts", [1, 4, 15, 16])
def test_probabilities_and_their_gradients_by_hand(experts: int) -> None:
    """In float32, of few experts and of many; p_j has the derivative p_j (1[j = k] - p_k) by logit k."""
    logits = torch.randn(6, experts, requires_grad=True)
    grad = torch.randn(6, experts)
    probs = route(logits, Grid(6, 1, 1)).probs
    probs.backward(grad)
    exact = logits.detach().double().exp()
    exact = exact / exact.sum(dim=1, keepdim=True)
    expected = exact * (grad - (exact * grad).sum(dim=1, keepdim=True))
    torch.testing.assert_close(probs.double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_perturbed_in_training_alone() -> None:
    router = Router(3, 4, 4, balancing="none")
    x = torch.randn(2, 3, 8, 8)
    plain = router(x)
    router.perturb = lambda logits: logits.flip(1)
    routing = router(x)
    assert torch.equal(routing.logits, plain.logits.flip(1))
    assert torch.equal(routing.expert_ids, 3 - plain.expert_ids)
    assert torch.equal(router.eval()(x).logits, plain.logits)


# Degenerate tables


@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_logits_still_give_distinct_experts(top_k: int) -> None:
    routing = route(torch.zeros(6, 4), Grid(1, 2, 3), top_k=top_k, capacity_factor=0.5, gate="prob")
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
    assert routing.dispatched_counts.max() <= routing.capacity
    torch.testing.assert_close(routing.gates, torch.full((6, top_k), 0.25))


def test_a_saturated_softmax_chooses_by_logit() -> None:
    """Probabilities 1, 0, 0 to the last bit: the second choice is still the second largest logit."""
    routing = route(torch.tensor([[0.0, 1e4, 2e4], [1e4, 0.0, 2e4]]), Grid(1, 1, 2), top_k=2)
    assert routing.expert_ids.tolist() == [[2, 1], [2, 0]]
    assert torch.isfinite(routing.gates).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 5}, "top_k=5"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": True}, "top_k=True"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor=inf"),
        ({"capacity_factor": math.nan}, "capacity_factor=nan"),
        ({"capacity_factor": "1.25"}, "capacity_factor='1.25'"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor=-1.0"),
        ({"gate": "soft"}, "gate='soft'"),
        ({"gate_input": "mean"}, "gate_input='mean'"),
        ({"hidden": 0}, "hidden=0"),
        ({"num_bands": -1}, "num_bands=-1"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Router(**({"in_channels": 3, "patch_size": 4, "num_experts": 4} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "probs"}, "gate='probs' is not one of 'prob', 'affinity', 'straight_through'"),
        ({"top_k": 4}, "top_k=4 must be a whole number between 1 and num_experts=3"),
        ({"top_k": 0}, "top_k=0 must be a whole number between 1 and num_experts=3"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be a positive number"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan must be a positive number"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a positive number"),
        ({"grid": Grid(1, 3, 3)}, r"logits of shape \(6, 3\) must be \[N, E\] with N = 9"),
        ({"logits": torch.zeros(6)}, r"logits of shape \(6,\) must be"),
        ({"logits": torch.zeros(6, 3).bfloat16()}, "must be float32 or float64"),
    ],
)
def test_a_router_of_ones_own_is_held_to_the_rules(options: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(6, 3), "grid": Grid(1, 2, 3)} | options
    with pytest.raises(ValueError, match=message):
        route(**arguments)
