"""The bias of trained routers, found anew for the weights that are kept."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn

from pcenet.nn import PCEConv2d, PCELayer, Router, update_expert_bias


def lopsided_layer(num_experts: int = 3) -> PCELayer:
    """A layer, as if trained, whose running mean of the bias sends every patch to the first expert."""
    torch.manual_seed(0)
    layer = PCELayer(3, 3, patch_size=2, num_experts=num_experts)
    with torch.no_grad():
        layer.router.logits.weight.mul_(8)
        layer.router.expert_bias.copy_(torch.tensor([9.0] + [0.0] * (num_experts - 1)))
    return layer.eval()


def photographs(count: int = 16) -> Tensor:
    """Images that differ in brightness more than their patches do."""
    torch.manual_seed(1)
    return torch.rand(count, 3, 8, 8) + 2 * torch.rand(count, 1, 1, 1)


def loads(layer: PCELayer, images: Tensor) -> list[int]:
    return layer.router(images).expert_counts.tolist()


def test_the_bias_is_that_of_all_patches_of_all_batches() -> None:
    layer, images = lopsided_layer(), photographs()
    assert loads(layer, images) == [256, 0, 0]
    update_expert_bias(images.split(5), layer, centring=0)
    with torch.no_grad():
        logits = reference.perceptron_logits(layer.router, images)
    expected = reference.balancing_bias(logits.tolist(), 1)
    assert layer.router.expert_bias.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(loads(layer, images)) - min(loads(layer, images)) <= 4  # of 256


def test_centring_takes_a_part_of_each_images_own_mean_off() -> None:
    router = lopsided_layer().router
    images = photographs(2)
    with torch.no_grad():
        router.centring.fill_(0.25)
        logits = reference.perceptron_logits(router, images)
        first, second = logits[:16], logits[16:]  # 4 x 4 patches each
        expected = torch.cat([first - 0.25 * first.sum(0) / 16, second - 0.25 * second.sum(0) / 16])
        torch.testing.assert_close(router(images).logits, expected + torch.tensor([9.0, 0, 0]))
        # A prediction knows its own image only, and in training nothing has changed.
        torch.testing.assert_close(router(images[1:]).logits, router(images).logits[16:])
        router.train()
        bias = logits.new_tensor(reference.balancing_bias(logits.tolist(), 1))
        torch.testing.assert_close(router(images).logits, logits + bias)


@pytest.mark.parametrize("centring", [0.0, 1.0])
def test_what_all_patches_of_an_image_share_moves_none_where_it_is_taken_off(centring: float) -> None:
    """Brightness adds the same to the logits of all patches of an image: the perceptron is made linear in it."""
    layer = lopsided_layer()
    update_expert_bias([photographs()], layer, centring=centring)
    raised = torch.tensor([3.0, 0.0, 0.0])  # what a new camera does to every patch's logits

    def choices(shift: Tensor) -> Tensor:
        with torch.no_grad():
            layer.router.logits.bias.add_(shift)
            choice = layer.router(photographs(4)).expert_ids
            layer.router.logits.bias.sub_(shift)
        return choice

    moved = (choices(torch.zeros(3)) != choices(raised)).float().mean().item()
    assert moved == 0 if centring else moved > 0.5


def test_a_later_layer_is_balanced_for_what_the_first_one_passes_on() -> None:
    torch.manual_seed(0)
    first, second = lopsided_layer(), lopsided_layer(4)
    network = nn.Sequential(first, second)
    images = photographs(32)
    update_expert_bias(((batch, torch.zeros(8)) for batch in images.split(8)), network)
    with torch.no_grad():
        for layer, patches in ((first, images), (second, first(images))):
            load = loads(layer, patches)
            assert min(load) > 0.8 * sum(load) / len(load), load


def test_nothing_else_changes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), PCELayer(3, 3, patch_size=2), PCEConv2d(3, 3, patch_size=2)
    ).train()
    network[1].eval()  # frozen
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    update_expert_bias([photographs(), photographs(4)], network)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{at}.router.{what}" for at in (2, 3) for what in ("expert_bias", "centring")}
    assert [network.training, network[0].training, network[1].training] == [True, True, False]
    assert network[2].router.training
    assert network[3].training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_where_a_batch_fails_everything_stays() -> None:
    layer = lopsided_layer().train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="must be a map"):
        update_expert_bias([photographs(), torch.zeros(3)], layer)
    assert layer.training
    reference.assert_same(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_without_a_batch_everything_stays() -> None:
    layer = lopsided_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="batches is empty"):
        update_expert_bias(iter([]), layer)
    reference.assert_same(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_networks_that_have_nothing_to_find_are_left_as_they_are() -> None:
    for network in (nn.Conv2d(3, 3, 1), PCELayer(3, 3, patch_size=2, balancing="none")):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        update_expert_bias([photographs()], network)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("further", ["training", "update_bn"])
def test_loads_stay_even_where_training_goes_on(further: str) -> None:
    """The running mean goes on where the bias that was found left it: both are of centred logits."""
    layer, images = lopsided_layer(), photographs(64)
    update_expert_bias([images], layer)
    if further == "training":
        layer.train()
        for _ in range(60):
            layer(images)
        layer.eval()
    else:
        torch.optim.swa_utils.update_bn([images] * 60, layer)
        layer.eval()
    load = loads(layer, images)
    assert min(load) > 0.8 * sum(load) / 3, load


def test_networks_saved_before_keep_their_outputs() -> None:
    layer = lopsided_layer()
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "router.centring"}
    expected = layer(photographs())
    update_expert_bias([photographs()], layer)
    assert not torch.equal(layer(photographs()), expected)
    layer.load_state_dict(saved)
    assert torch.equal(layer(photographs()), expected)
    plain = Router(3, 2, 3, balancing="none")
    assert "centring" not in plain.state_dict()
    saved = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in saved.items()}
    layer.load_state_dict(saved, assign=True)
    assert layer.router.centring.dtype == torch.float64


@pytest.mark.parametrize("centring", [-0.1, 1.5, "half", float("nan")])
def test_a_centring_that_is_none(centring: object) -> None:
    with pytest.raises(ValueError, match=r"centring=.* must be a number from 0 to 1"):
        update_expert_bias([photographs()], lopsided_layer(), centring=centring)  # type: ignore[arg-type] # what is refused
