"""The bias that evens out the loads."""

from __future__ import annotations

import pytest
import reference
import torch

from pcenet.nn import PCELayer, Router, load_balance_loss
from pcenet.nn.balancing import balancing_bias


def loads(logits: torch.Tensor, top_k: int = 1) -> list[int]:
    choice = (logits + balancing_bias(logits, top_k)).topk(top_k, dim=1).indices
    return torch.bincount(choice.flatten(), minlength=logits.shape[1]).tolist()


def test_two_experts_by_hand() -> None:
    # The differences l_0 - l_1 are 5, 4, 3, 1: everybody would go to expert 0. Half of the patches stay where the bias
    # takes something between 3 and 4 from the difference; the fixed point of the sweeps is the middle, 3.5, so that
    # each expert moves by 1.75. Undamped steps of d would overshoot to -d; with 0.7 what remains after a sweep of the
    # deviation is 1 - 2 * 0.7 = -0.4 of it. The start is the mean difference 13/4, a deviation of 3.25 - 3.5.
    logits = torch.tensor([[5.0, 0], [4, 0], [3, 0], [1, 0]], dtype=torch.float64)
    bias = balancing_bias(logits)
    assert (bias[1] - bias[0]).item() == pytest.approx(3.5 - 0.25 * 0.4**8, abs=1e-12)
    assert bias.sum().item() == pytest.approx(0, abs=1e-12)
    assert loads(logits) == [2, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("patches", "experts"), [(40, 4), (41, 4), (9, 3), (5, 4), (3, 4), (1, 4), (64, 2), (1100, 5)])
def test_equals_the_naive_rounds(patches: int, experts: int, top_k: int, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 the compiled operator's."""
    torch.manual_seed(patches + experts)
    logits = torch.randn(patches, experts, dtype=dtype) * 3 + torch.randn(experts, dtype=dtype)
    expected = reference.balancing_bias(logits.tolist(), top_k)
    assert balancing_bias(logits, top_k).tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leads_that_are_equal_share_a_border(dtype: torch.dtype) -> None:
    """Whole numbers, of which many are equal, and zeros of both signs."""
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0], [-0.0, 0], [2, 0], [2, 3], [0, 3]], dtype=dtype)
    expected = reference.balancing_bias(logits.tolist(), 1)
    assert balancing_bias(logits).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_loads_become_even_however_lopsided_the_logits(top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 4) * torch.tensor([0.1, 1.0, 2.0, 4.0]) + torch.tensor([9.0, 0, -3, 1])
    fair = 512 * top_k / 4
    assert max(loads(logits, top_k)) < 1.02 * fair
    assert min(loads(logits, top_k)) > 0.98 * fair


def test_equal_patches_cannot_be_parted_and_do_no_harm() -> None:
    bias = balancing_bias(torch.tensor([[3.0, 1.0, 0.0]]).expand(30, 3))
    assert torch.isfinite(bias).all()


def test_in_training_loads_are_even_and_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    router = Router(8, 4, 4, capacity_factor=1.25)
    with torch.no_grad():
        router.logits.bias.copy_(torch.tensor([5.0, 0, 0, 0]))
    routing = router(torch.randn(16, 8, 16, 16))
    assert max(routing.expert_counts.tolist()) <= 1.05 * 256 / 4
    assert routing.dispatch_mask.all()
    assert load_balance_loss(routing).item() == pytest.approx(1, abs=0.05)
    plain = Router(8, 4, 4, capacity_factor=1.25, balancing="none")
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if k not in ("expert_bias", "centring")})
    torch.manual_seed(0)
    assert plain(torch.randn(16, 8, 16, 16)).expert_counts.tolist() == [256, 0, 0, 0]


def test_the_running_mean_is_used_at_evaluation_and_independent_of_the_batch() -> None:
    torch.manual_seed(0)
    router = Router(3, 2, 3)
    expected = torch.zeros(3)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        with torch.no_grad():
            bias = balancing_bias(router.compute_logits(x))
        router(x)
        expected = 0.9 * expected + 0.1 * bias
    torch.testing.assert_close(router.expert_bias, expected)
    router.eval()
    x = torch.randn(4, 3, 8, 8)
    before = router.expert_bias.clone()
    torch.testing.assert_close(router(x).logits, router.compute_logits(x) + expected)
    torch.testing.assert_close(router(x[:1]).logits, router(x).logits[:16])
    assert torch.equal(router.expert_bias, before)


def test_no_gradient_goes_through_the_bias_nor_through_what_it_would_undo() -> None:
    """It is the gradient of the logits minus their mean over the batch, expert by expert."""
    torch.manual_seed(0)
    router = Router(3, 2, 3).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(32, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad((router(x).logits * direction).sum(), x)
    logits = router.compute_logits(x)
    centred = logits - logits.sum(0) / 32
    (expected,) = torch.autograd.grad((centred * direction).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_raising_an_expert_for_all_patches_is_no_way_to_lower_a_loss() -> None:
    """The loss wants the first expert to be more probable everywhere: its logits' mean must not be pushed at all."""
    torch.manual_seed(0)
    router = Router(3, 2, 3).double()
    (-router(torch.randn(2, 3, 8, 8, dtype=torch.float64)).logits[:, 0].sum()).backward()
    assert router.logits.bias.grad.abs().max() < 1e-14
    router.eval()  # there the bias is fixed, and a fine-tuning with frozen statistics may move the logits
    router.zero_grad()
    (-router(torch.randn(2, 3, 8, 8, dtype=torch.float64)).logits[:, 0].sum()).backward()
    assert router.logits.bias.grad.tolist() == [-32, 0, 0]


def test_checkpointing_routes_the_same_twice() -> None:
    """The second pass must choose as the first did, although the running mean has moved in between."""
    torch.manual_seed(0)
    layer = PCELayer(4, 4, patch_size=2, num_experts=3).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_unknown_balancing() -> None:
    with pytest.raises(ValueError, match=r"balancing='loss' .*'batch'.*'none'|balancing"):
        Router(3, 2, 3, balancing="loss")


def test_logits_that_are_no_numbers_give_no_bias() -> None:
    """A diverged network ends by its own check, not here."""
    logits = torch.randn(500, 4)
    logits[::3, 1] = float("nan")
    assert not balancing_bias(logits).isfinite().any()
