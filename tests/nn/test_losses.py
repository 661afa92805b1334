"""Auxiliary losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor, nn

from pcenet.nn import (
    Grid,
    PCELayer,
    Routing,
    aux_loss,
    aux_terms,
    load_balance_loss,
    record_routing,
    route,
    z_loss,
)


def routing_of(logits: Tensor, **options: object) -> Routing:
    return route(logits, Grid(1, 1, len(logits)), **options)


def from_probs(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [2, 4, 7])
def test_uniform_router(experts: int, top_k: int) -> None:
    """p = 1/E everywhere: balance E * sum_e (1/E) a_e = sum_e a_e = 1, whoever was chosen; logsumexp 0 = ln E."""
    routing = routing_of(torch.zeros(12, experts, dtype=torch.float64), top_k=top_k)
    assert load_balance_loss(routing).item() == pytest.approx(1, abs=1e-12)
    assert z_loss(routing).item() == pytest.approx(math.log(experts) ** 2, abs=1e-12)
    assert z_loss(routing, squared=False).item() == pytest.approx(math.log(experts), abs=1e-12)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_collapsed_router(experts: int) -> None:
    """p = a = (1, 0, ...): E * 1 * 1."""
    logits = torch.zeros(12, experts, dtype=torch.float64)
    logits[:, 1] = 100
    routing = routing_of(logits)
    assert load_balance_loss(routing).item() == pytest.approx(experts, abs=1e-9)
    assert z_loss(routing).item() == pytest.approx(1e4, abs=1e-9)


def test_balance_by_hand() -> None:
    # mean p = (.6, .4); patches 0, 1 choose expert 0 and patch 2 expert 1: a = (2/3, 1/3).
    # 2 * (.6 * 2/3 + .4 * 1/3) = 2 * (1.6 / 3) = 16/15.
    logits = from_probs([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    assert load_balance_loss(routing_of(logits)).item() == pytest.approx(16 / 15, abs=1e-12)


def test_balance_with_two_choices_by_hand() -> None:
    logits = from_probs([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.2, 0.25, 0.55]])
    # Choices (0, 1), (0, 1), (2, 1): a / k = (2, 3, 1) / 6; mean p = (.4, .3, .3).
    # 3 * (.4 * 2 + .3 * 3 + .3 * 1) / 6 = 3 * 2.0 / 6 = 1.
    routing = routing_of(logits, top_k=2)
    assert routing.expert_counts.tolist() == [2, 3, 1]
    assert load_balance_loss(routing).item() == pytest.approx(1.0, abs=1e-12)


def test_collapsed_with_two_choices() -> None:
    """Always the experts 0 and 1 of 4, half each: 4 * (1/2 * 1/2 + 1/2 * 1/2) = 2 = E / k."""
    logits = reference.float64([[50.0, 50.0, 0.0, 0.0]] * 6)
    assert load_balance_loss(routing_of(logits, top_k=2)).item() == pytest.approx(2, abs=1e-9)


def test_balance_gradient_by_hand() -> None:
    """Both patches choose expert 0, so a = (1, 0), L = 2 * mean_i p_i0 and dL/dl_i0 = 2/2 * p_i0 p_i1 = -dL/dl_i1.
    Nothing flows through a."""
    logits = from_probs([[0.8, 0.2], [0.6, 0.4]])
    loss = load_balance_loss(routing_of(logits))
    assert loss.item() == pytest.approx(1.4, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = reference.float64([[0.16, -0.16], [0.24, -0.24]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_z_gradient_by_hand() -> None:
    """z = logsumexp; d mean(z^2) / dl_ij = 2 z_i p_ij / N, and p_ij / N without the square."""
    shift = reference.float64([[math.log(2.0)], [0.0]])  # logsumexp: ln 2 and 0
    logits = (from_probs([[0.75, 0.25], [0.5, 0.5]]) + shift).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(z_loss(routing_of(logits)), logits)
    expected = reference.float64([[0.75 * math.log(2), 0.25 * math.log(2)], [0, 0]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(z_loss(routing_of(logits), squared=False), logits)
    torch.testing.assert_close(gradient, reference.float64([[0.375, 0.125], [0.25, 0.25]]))


def test_losses_are_those_before_dropping() -> None:
    logits = torch.randn(20, 3, dtype=torch.float64)
    free, limited = routing_of(logits), routing_of(logits, capacity_factor=0.3)
    assert limited.dispatch_mask.sum() < 20
    assert load_balance_loss(limited).item() == load_balance_loss(free).item()
    assert z_loss(limited).item() == z_loss(free).item()


@pytest.mark.parametrize("gate", ["prob", "straight_through"])
def test_losses_do_not_depend_on_the_gate(gate: str) -> None:
    """16/15 as above, by probabilities, whatever the experts' outputs are multiplied by."""
    logits = from_probs([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    assert load_balance_loss(routing_of(logits, gate=gate)).item() == pytest.approx(16 / 15, abs=1e-12)


def test_aux_loss_sums_layers_and_averages_calls() -> None:
    collapsed = reference.float64([[50.0, 0.0]] * 4)  # balance 2, z 2500
    uniform = torch.zeros(4, 2, dtype=torch.float64)  # balance 1, z (ln 2)^2
    records = {"first": [routing_of(collapsed), routing_of(uniform)], "second": [routing_of(uniform)]}
    z_uniform = math.log(2) ** 2
    assert aux_loss(records, balance=1, z=0).item() == pytest.approx((2 + 1) / 2 + 1, abs=1e-9)
    assert aux_loss(records, balance=0, z=1).item() == pytest.approx((2500 + z_uniform) / 2 + z_uniform, abs=1e-6)
    expected = 0.01 * 2.5 + 0.001 * ((2500 + z_uniform) / 2 + z_uniform)
    assert aux_loss(records).item() == pytest.approx(expected, abs=1e-9)
    assert aux_loss(records).dtype == torch.float64


def test_aux_loss_of_nothing_is_zero() -> None:
    """One training loop serves networks with and without routed layers."""
    loss = aux_loss({})
    assert loss.shape == ()
    assert loss.item() == 0
    weight = torch.ones(1, requires_grad=True)
    (weight.sum() + loss).backward()


def test_aux_loss_reaches_every_router() -> None:
    model = nn.Sequential(PCELayer(3, 4, patch_size=2), nn.ReLU(), PCELayer(4, 4, patch_size=2))
    with record_routing(model) as records:
        model(torch.randn(2, 3, 4, 4))
    aux_loss(records).backward()
    for name, parameter in model.named_parameters():
        in_second_experts = name.startswith("2.") and ".router." not in name
        if in_second_experts:
            assert parameter.grad is None, f"{name}: the auxiliary losses are the routers' and what feeds them"
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_terms_apart_and_a_weight_of_zero() -> None:
    # Uniform: balance 1 and z (ln 2)^2 per layer. One logit of 1e200 makes the z-loss infinite; without weight it must
    # not reach the sum as 0 * inf.
    uniform = routing_of(torch.zeros(4, 2, dtype=torch.float64))
    terms = aux_terms({"a": [uniform], "b": [uniform, uniform]})
    assert terms.balance.item() == pytest.approx(2, abs=1e-12)
    assert terms.z.item() == pytest.approx(2 * math.log(2) ** 2, abs=1e-12)
    huge = routing_of(torch.tensor([[1e200, 0.0]], dtype=torch.float64))
    assert aux_terms({"a": [huge]}).z.isinf()
    assert aux_loss({"a": [huge]}, balance=0.5, z=0.0).item() == pytest.approx(0.5 * 2)
    assert aux_loss({"a": [uniform]}, balance=0.0, z=0.0).item() == 0
