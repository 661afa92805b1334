"""PCEConv2d against a loop over patches that cuts each from its expert's convolution of the whole map."""

from __future__ import annotations

import copy
import math
from threading import Barrier, Thread
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pcenet.nn import Grid, PCEConv2d, Routing, aux_loss, record_routing
from pcenet.nn.conv import leaders_of, why_not


def make_conv(kernel_size: int = 3, *, num_experts: int = 3, **options: Any) -> PCEConv2d:
    conv = PCEConv2d(2, 5, kernel_size, num_experts=num_experts, **options).double()
    return reference.randomise(conv)


def make_routing(choice: Tensor, grid: Grid, num_experts: int, dropped: tuple[int, ...] = ()) -> Routing:
    """A routing written by hand; its weights are a leaf."""
    kept = torch.ones_like(choice, dtype=torch.bool)
    kept[list(dropped)] = False
    weight = torch.linspace(0.4, 1.3, choice.numel(), dtype=torch.float64).view_as(choice).requires_grad_()
    logits = torch.zeros(len(choice), num_experts, dtype=torch.float64)
    return Routing(logits, logits.softmax(1), choice, weight, kept, None, grid)


def naive(conv: PCEConv2d, x: Tensor, routing: Routing) -> Tensor:
    """Each patch is cut out of the whole map as each of its experts would convolve it."""
    batch, _, height, width = x.shape
    size = conv.patch_size
    weight = conv.kernels.weight
    out = x.new_zeros(batch, conv.out_channels, height, width)
    number = 0
    for image in range(batch):
        for top in range(0, height, size):
            for left in range(0, width, size):
                for place, expert in enumerate(routing.expert_ids[number].tolist()):
                    bias = None if conv.bias is None else conv.bias[expert]
                    whole = F.conv2d(x[image : image + 1], weight[expert], bias, padding=weight.shape[-1] // 2)[0]
                    factor = routing.gates[number, place] * routing.dispatch_mask[number, place]
                    mask = torch.zeros(height, width, dtype=x.dtype)
                    mask[top : top + size, left : left + size] = 1
                    out = out + F.one_hot(torch.tensor(image), batch)[:, None, None, None] * whole * mask * factor
                number += 1
    return out


@pytest.mark.parametrize("shared_kernel", [True, False])
@pytest.mark.parametrize(("kernel_size", "patch_size"), [(3, 1), (3, 2), (3, 3), (3, 4), (1, 1), (1, 2), (1, 3)])
def test_equals_the_naive_loop_outputs_and_gradients(kernel_size: int, patch_size: int, shared_kernel: bool) -> None:
    """On a map that 2, 3 and 4 do not divide; expert 1 is idle, two patches are dropped."""
    conv = make_conv(kernel_size, patch_size=patch_size, shared_kernel=shared_kernel)
    grid = Grid(2, math.ceil(5 / patch_size), math.ceil(7 / patch_size))
    choice = torch.randint(2, (grid.patches, 1)) * 2
    routing = make_routing(choice, grid, 3, dropped=(0, grid.patches - 1))
    x = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    expected, actual = naive(conv, x, routing), conv.forward_given_routing(x, routing)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)
    tensors = {"x": x, "gate": routing.gates, "bias": conv.bias, **dict(conv.kernels.named_parameters())}
    direction = torch.randn_like(expected)
    found = [torch.autograd.grad((out * direction).sum(), list(tensors.values())) for out in (actual, expected)]
    reference.assert_same(*(dict(zip(tensors, grads, strict=True)) for grads in found))
    of_kernels = dict(zip(tensors, found[0], strict=True))["weight" if not shared_kernel else "difference"]
    assert of_kernels[1].abs().max() == 0  # the idle expert's
    assert of_kernels[0].abs().max() > 0


def test_two_experts_per_patch() -> None:
    conv = make_conv(patch_size=2, top_k=2)
    choice = torch.stack([torch.randperm(3)[:2] for _ in range(8)])
    routing = make_routing(choice, Grid(2, 2, 2), 3)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        conv.forward_given_routing(x, routing), naive(conv, x, routing), rtol=1e-10, atol=1e-10, check_stride=False
    )
    assert conv(x).shape == (2, 5, 4, 4)


def test_without_bias_a_dropped_patch_is_zero() -> None:
    conv = make_conv(patch_size=2, bias=False)
    routing = make_routing(torch.tensor([[0], [2]]), Grid(1, 1, 2), 3, dropped=(1,))
    out = conv.forward_given_routing(torch.randn(1, 2, 2, 4, dtype=torch.float64), routing)
    assert out[..., :2].abs().min() > 0
    assert out[..., 2:].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"shared_kernel": False}, {"top_k": 2}, {"kernel_size": 1, "bias": False}])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 8])
def test_copies_of_a_convolution_are_that_convolution(patch_size: int, options: dict[str, Any]) -> None:
    """In training too, whatever the router does, at sizes that the patches divide or not."""
    size, bias = options.get("kernel_size", 3), options.get("bias", True)
    rest = {name: value for name, value in options.items() if name not in ("kernel_size", "bias")}
    dense = nn.Conv2d(3, 4, size, padding=size // 2, bias=bias)
    conv = PCEConv2d.from_conv2d(dense, patch_size=patch_size, **rest)
    assert conv.training
    for x in (torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 11)):
        torch.testing.assert_close(conv(x), dense(x), rtol=1e-5, atol=1e-5, check_stride=False)
    for expert in range(4):
        assert torch.equal(conv.to_conv2d(expert).weight, dense.weight)


def test_perturbation_is_by_the_kernels_own_spread() -> None:
    dense = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        dense.weight.mul_(7)
    conv = PCEConv2d.from_conv2d(dense, patch_size=2, perturbation=0.1)
    assert torch.equal(conv.kernels.shared, dense.weight)
    for difference in conv.kernels.difference:
        assert float((difference.std() / dense.weight.std()).detach()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(conv.kernels.difference[0], conv.kernels.difference[1])
    with pytest.raises(ValueError, match=r"perturbation=-1 must be a number, and at least 0"):
        PCEConv2d.from_conv2d(dense, patch_size=2, perturbation=-1)


def test_a_kernel_of_one_number_has_no_spread_to_perturb_it_by() -> None:
    dense = nn.Conv2d(1, 1, 1)
    conv = PCEConv2d.from_conv2d(dense, patch_size=2, perturbation=0.1)
    assert torch.equal(conv.kernels(), dense.weight.expand(4, 1, 1, 1, 1))


def test_the_output_may_be_changed_in_place() -> None:
    """What follows a convolution often works in place; gradients are those of the same out of place."""
    conv = make_conv(patch_size=3)
    x = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(f(conv(x)).square().sum(), [x, *conv.parameters()]) for f in (F.relu, F.relu_)]
    for plain, in_place in zip(*grads, strict=True):
        torch.testing.assert_close(plain, in_place)


def test_a_follower_uses_the_routing_of_its_leader_and_keeps_nothing() -> None:
    first = make_conv(patch_size=2)
    second = reference.randomise(PCEConv2d(5, 4, patch_size=2, num_experts=3, router=first).double(), seed=1)
    assert second.router is None
    assert second.follows(first)
    assert not first.follows(second)
    block = nn.Sequential(first, nn.ReLU(), second)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with record_routing(block) as records:
        out = block(x)
    assert list(records) == ["0"]
    (routing,) = records["0"]
    expected = naive(second, naive(first, x, routing).relu(), routing)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10, check_stride=False)
    with pytest.raises(ValueError, match="has not run before it in this pass"):
        second(torch.randn(2, 5, 6, 6, dtype=torch.float64))
    first(x[:, :, :4])
    with pytest.raises(ValueError, match=r"has the patches Grid\(batch=2, rows=3, columns=3\), and its routing is for"):
        second(torch.randn(2, 5, 6, 6, dtype=torch.float64))


def test_a_routing_that_no_follower_has_taken_is_not_copied() -> None:
    first = PCEConv2d(3, 3, patch_size=2)
    block = nn.Sequential(first, PCEConv2d(3, 3, patch_size=2, router=first))
    first(torch.randn(1, 3, 4, 4))
    twin = copy.deepcopy(block)
    with pytest.raises(ValueError, match="has not run before it in this pass"):
        twin[1](torch.randn(1, 3, 4, 4))
    assert block[1](torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_a_copied_follower_follows_the_copied_leader() -> None:
    first = PCEConv2d(3, 3, patch_size=2)
    block = nn.Sequential(first, PCEConv2d(3, 3, patch_size=2, router=first))
    twin = copy.deepcopy(block)
    assert leaders_of(nn.ModuleList([block, twin])) == {block[1]: block[0], twin[1]: twin[0]}
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(twin(x), block(x))
    assert twin.state_dict().keys() == block.state_dict().keys()
    assert not [name for name in block.state_dict() if name.startswith("1.router")]


def test_copies_of_parts() -> None:
    """A leader's copy leads nobody, and a follower's has nobody to follow."""
    first = PCEConv2d(3, 3, patch_size=2)
    second = PCEConv2d(3, 3, patch_size=2, router=first)
    leader, follower = copy.deepcopy(first), copy.deepcopy(second)
    assert leaders_of(nn.ModuleList([first, second, leader, follower])) == {second: first}
    x = torch.randn(1, 3, 4, 4)
    first(x)
    leader(x)
    with pytest.raises(ValueError, match="has not run before it in this pass"):
        follower(x)
    assert second(x).shape == x.shape


def test_threads_that_share_a_network_have_routings_of_their_own() -> None:
    """Both leaders run before either follower does."""
    first = make_conv(patch_size=2).eval()
    second = reference.randomise(PCEConv2d(5, 4, patch_size=2, num_experts=3, router=first).double(), seed=1).eval()
    maps = [torch.randn(2, 2, 6, 6, dtype=torch.float64), torch.randn(2, 2, 4, 4, dtype=torch.float64)]
    expected = [second(first(x).relu()) for x in maps]
    both = Barrier(2)
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        hidden = first(maps[index]).relu()
        both.wait()
        found[index] = second(hidden)

    threads = [Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-10, atol=1e-10)


def test_auxiliary_loss_and_gate_train_the_router() -> None:
    conv = PCEConv2d(3, 4, patch_size=2)
    with record_routing(nn.Sequential(conv)) as records:
        out = conv(torch.randn(2, 3, 8, 8))
    for loss in (aux_loss(records), out.square().sum()):
        grads = torch.autograd.grad(loss, list(conv.router.parameters()), retain_graph=True)
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    first = PCEConv2d(3, 3, patch_size=2)
    block = nn.Sequential(first, nn.ReLU(), PCEConv2d(3, 3, patch_size=2, router=first))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    plain = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again.square().sum(), [x, *block.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_on_the_meta_device_and_in_bfloat16() -> None:
    conv = PCEConv2d(3, 4, patch_size=4)
    assert copy.deepcopy(conv).to("meta")(torch.zeros(2, 3, 9, 9, device="meta")).shape == (2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16
    assert conv.to(torch.bfloat16)(torch.randn(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16


def scaled() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 3, 5, padding=2), "kernel_size=(5, 5) is neither 3 nor 1"),
        (nn.Conv2d(3, 3, (1, 3), padding=(0, 1)), "kernel_size=(1, 3) is neither 3 nor 1"),
        (nn.Conv2d(3, 3, 3, padding=1, stride=2), "stride=(2, 2) is not 1"),
        (nn.Conv2d(3, 3, 3, padding=2, dilation=2), "dilation=(2, 2) is not 1"),
        (nn.Conv2d(3, 3, 3, padding=1, groups=3), "groups=3 is not 1"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "padding_mode='circular' is not 'zeros'"),
        (nn.Conv2d(3, 3, 3), "padding=(0, 0) does not keep the map's size"),
        (nn.Conv2d(3, 3, 1, padding=1), "padding=(1, 1) does not keep the map's size"),
        (scaled(), "its weight is parametrised"),
        (hooked(), "it has hooks"),
        (nn.LazyConv2d(3, 3, padding=1), "it is a LazyConv2d, not a plain Conv2d"),
        (nn.ConvTranspose2d(3, 3, 3, padding=1), "it is a ConvTranspose2d, not a plain Conv2d"),
    ],
)
def test_what_cannot_be_replaced_is_refused(conv: nn.Module, reason: str) -> None:
    assert why_not(conv) == reason
    with pytest.raises(ValueError, match="leave this convolution as it is"):
        PCEConv2d.from_conv2d(conv, patch_size=2)


def test_a_weight_that_a_hook_computes_is_seen() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    prune.l1_unstructured(conv, "weight", 0.5)
    assert why_not(conv) == "its weight is computed from other parameters"
    assert why_not(nn.Conv2d(3, 3, 3, padding="same")) is None
    assert why_not(nn.Conv2d(3, 3, 1, padding="valid")) is None
    assert why_not(nn.Conv2d(3, 3, 3, padding="valid")) == "padding=valid does not keep the map's size"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 2}, r"stride=2 is not 1; take nn\.Conv2d"),
        ({"groups": 2}, "groups=2 is not 1"),
        ({"padding": 0}, "padding=0 does not keep"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number and at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be"),
        ({"gate": "soft"}, "gate='soft' is not one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PCEConv2d(4, 4, **({"patch_size": 2} | arguments))


def test_a_follower_must_fit_its_leader() -> None:
    leader = PCEConv2d(3, 3, patch_size=2)
    with pytest.raises(ValueError, match="patch_size=4 must be the leader's, 2"):
        PCEConv2d(3, 3, patch_size=4, router=leader)
    with pytest.raises(ValueError, match="num_experts=2 must be the leader's, 4"):
        PCEConv2d(3, 3, patch_size=2, num_experts=2, router=leader)
    with pytest.raises(ValueError, match="gate: no effect on a layer that follows"):
        PCEConv2d(3, 3, patch_size=2, router=leader, gate="prob")
    with pytest.raises(ValueError, match="router must be the PCEConv2d to follow, not a Router"):
        PCEConv2d(3, 3, patch_size=2, router=leader.router)
    assert leaders_of(leader) == {}
    with pytest.raises(ValueError, match="not one that follows another"):
        PCEConv2d(3, 3, patch_size=2, router=PCEConv2d(3, 3, patch_size=2, router=leader))
    with pytest.raises(ValueError, match=r"x of shape \(1, 4, 8, 8\) must be a map \[B, 3, H, W\]"):
        leader(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="expert=4 must lie between 0 and 3"):
        leader.to_conv2d(4)
