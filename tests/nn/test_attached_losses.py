"""Auxiliary losses that ride on the backward pass, against the loss that a training loop would add."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pcenet
from pcenet.nn import PCEConv2d, PCELayer, attach_aux_losses, aux_loss, record_routing

BALANCE, Z = 0.3, 0.07
Forward = Callable[[nn.Module, Tensor], Tensor]


class Mixed(nn.Module):
    """A layer that drops patches, one whose map its patches do not divide, and two convolutions with one router."""

    def __init__(self="sorted", gate: str = "prob", top_k: int = 1) -> None:
        super().__init__()
        shared = {"gate": gate, "top_k": top_k, "num_experts": 3}
        self.first = PCELayer(3, 4, patch_size=2, capacity_factor=0.8, **shared)
        self.second = PCELayer(4, 4, patch_size=4, shortcut=False, **shared)
        self.lead = PCEConv2d(4, 4, patch_size=2, num_experts=2, gate=gate)
        self.follow = PCEConv2d(4, 4, patch_size=2, num_experts=2, router=self.lead)

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self.lead(self.second(self.first(x))).relu())


def network(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return Mixed(**options).double()


def images(seed: int = 1) -> Tensor:
    return torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def added(model: nn.Module, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """What a loop gets that adds the loss itself."""
    model.zero_grad()
    with record_routing(model) as records:
        loss = model(x).square().mean()
    (factor * (loss + aux_loss(records, BALANCE, Z))).backward()
    return gradients(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10, msg=name)


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)


def recorded(model: nn.Module, x: Tensor) -> Tensor:
    with record_routing(model):
        return model(x)


@pytest.mark.parametrize("forward", [plainly, checkpointed, reentrant, recorded])
def test_gradients_are_those_of_the_sum(forward: Forward) -> None:
    expected = added(network(), images())
    model = network()
    attached = attach_aux_losses(model, BALANCE, Z)
    assert attached.layers == ("first", "second", "lead")
    forward(model, images()).square().mean().backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize(("gate", "top_k"), [("straight_through", 1), ("prob", 2), ("straight_through", 2)])
def test_whatever_the_gate(gate: str, top_k: int) -> None:
    expected = added(network(gate=gate, top_k=top_k), images())
    model = network(gate=gate, top_k=top_k)
    attach_aux_losses(model, BALANCE, Z)
    model(images()).square().mean().backward()
    assert_equal(gradients(model), expected)


def test_the_loss_matters_at_all() -> None:
    """What the tests above would not notice if both sides had no auxiliary gradient."""
    with_it, model = added(network(), images()), network()
    model(images()).square().mean().backward()
    without = gradients(model)
    for layer in ("first", "second", "lead"):
        name = f"{layer}.router.logits.weight"
        assert (with_it[name] - without[name]).abs().max() > 1e-4, name


def test_an_upcycled_network() -> None:
    def upcycled() -> nn.Module:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
        return pcenet.upcycle(body, layers=1.0, num_experts=2, patch_size=2, example=images())

    expected = added(upcycled(), images())
    model = upcycled()
    assert attach_aux_losses(model, BALANCE, Z).layers
    model(images()).square().mean().backward()
    assert_equal(gradients(model), expected)


def test_outputs_are_the_same_bits_and_records_the_same_routings() -> None:
    plain, model = network(), network()
    attach_aux_losses(model, BALANCE, Z)
    with record_routing(plain) as expected, record_routing(model) as found:
        assert torch.equal(model(images()), plain(images()))
    for name, (routing,) in expected.items():
        assert torch.equal(found[name][0].logits, routing.logits)
        assert torch.equal(found[name][0].gates, routing.gates)
    # A recorder that came first sees them as well.
    model, plain = network(), network()
    with record_routing(model) as found:
        attach_aux_losses(model, BALANCE, Z)
        model(images())
    with record_routing(plain) as expected:
        plain(images())
    assert torch.equal(found["first"][0].probs, expected["first"][0].probs)


def test_evaluation_has_none() -> None:
    model, plain = network().eval(), network().eval()
    attach_aux_losses(model, BALANCE, Z)
    for each in (model, plain):
        each(images()).square().mean().backward()
    assert_equal(gradients(model), gradients(plain))
    with torch.no_grad():
        assert torch.equal(model.train()(images()), plain.train()(images()))


def test_removed_it_is_gone_and_may_come_again() -> None:
    model, plain = network(), network()
    attached = attach_aux_losses(model, 100.0, 100.0)
    attached.remove()
    attached.remove()
    assert not model.first.router._forward_hooks
    for each in (model, plain):
        each(images()).square().mean().backward()
    assert_equal(gradients(model), gradients(plain))
    expected = added(network(), images())
    model = network()
    attach_aux_losses(model).remove()
    attach_aux_losses(model, BALANCE, Z)
    model(images()).square().mean().backward()
    assert_equal(gradients(model), expected)


def test_twice_is_refused() -> None:
    model = network()
    attach_aux_losses(model.second)
    with pytest.raises(ValueError, match=r"attached already, at second, .*remove\(\)"):
        attach_aux_losses(model)
    assert not model.first.router._forward_hooks, "nothing is attached by half"
    with pytest.raises(ValueError, match="at the layer itself"):
        attach_aux_losses(model.second)


def test_a_copy_shares_it() -> None:
    """As timm's moving average of the weights makes one."""
    model = network()
    attached = attach_aux_losses(model, BALANCE, Z, scale=lambda: 1.0)
    average = copy.deepcopy(model)
    with pytest.raises(ValueError, match="attached already"):
        attach_aux_losses(average)
    average(images()).square().mean().backward()
    assert_equal(gradients(average), added_without_hooks(average))
    attached.remove()
    attach_aux_losses(average).remove()


def added_without_hooks(model: nn.Module) -> dict[str, Tensor]:
    """What a loop would get that adds the loss to a fresh network with the weights of another."""
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    return added(fresh, images())


def test_a_dense_network_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    assert attach_aux_losses(model).layers == ()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("constant", [True, False])
def test_accumulated_gradients(constant: bool) -> None:
    """Two batches whose losses are halved: the mean of both gradients."""
    expected = [added(network(), images(seed), factor=0.5) for seed in (1, 2)]
    model = network()
    start = copy.deepcopy(model.state_dict())
    attach_aux_losses(model, BALANCE, Z, scale=0.5 if constant else lambda: torch.tensor(0.5))
    for seed in (1, 2):
        model.load_state_dict(start)  # the running statistics of the first batch
        (model(images(seed)).square().mean() / 2).backward()
    assert_equal(gradients(model), {name: expected[0][name] + expected[1][name] for name in expected[0]})


def test_loss_scaling() -> None:
    expected = added(network(), images())
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters())
    attach_aux_losses(model, BALANCE, Z, scale=scaler.get_scale)
    scaler.scale(model(images()).square().mean()).backward()
    scaler.unscale_(optimizer)
    assert_equal(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, of its graph's inputs
def test_compiled_afterwards() -> None:
    torch.compiler.reset()
    expected = added(network(), images())
    model = network()
    attach_aux_losses(model, BALANCE, Z)
    torch.compile(model, backend="aot_eager")(images()).square().mean().backward()
    assert_equal(gradients(model), expected)
    torch.compiler.reset()


def test_a_compiled_network_is_refused() -> None:
    with pytest.raises(ValueError, match="attach the losses before compiling it"):
        attach_aux_losses(torch.compile(network(), backend="eager"))


def test_gradients_of_gradients() -> None:
    """The penalty on the input's gradient leaves the auxiliary part as it is."""
    x = images().requires_grad_()
    found = []
    for attach in (False, True):
        model = network().eval()
        for module in model.modules():  # training mode of the routers alone: batch statistics would enter as well
            if hasattr(module, "expert_bias"):
                module.train()
        if attach:
            attach_aux_losses(model, BALANCE, Z)
            loss = model(x).square().mean()
        else:
            with record_routing(model) as records:
                loss = model(x).square().mean()
            loss = loss + aux_loss(records, BALANCE, Z)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(slope.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": -1}, "balance=-1 must be a finite number and at least 0"),
        ({"z": float("nan")}, "z=nan must be a finite number"),
        ({"scale": "big"}, "scale='big' must be .*or a function that gives one"),
    ],
)
def test_wrong_numbers(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_aux_losses(network(), **options)
