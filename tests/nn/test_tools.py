"""Tools that people use on modules, on every kind of network with experts and on what it stands for: what happens to a
dense network happens to it, or it says in one sentence what to do instead."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from safetensors.torch import load_model, save_model
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.flop_counter import FlopCounterMode

from pcenet.models import create_network
from pcenet.nn import (
    PCEConv2d,
    PCELayer,
    Router,
    attach_aux_losses,
    aux_loss,
    record_routing,
    routers_of,
)
from pcenet.nn.experts import double_conv
from pcenet.nn.stacked import SharedConv2d, StackedBatchNorm, StackedConv2d
from pcenet.upcycling import upcycle

WIDTHS = {"widths": (8, 12, 16), "num_classes": 3}
SIDE = 16


def resnet() -> nn.Module:
    widths = {"channels": (4, 4, 6, 6), "stem_width": 4, "num_classes": 3}
    return ResNet(BasicBlock, layers=(1, 1, 1, 1), zero_init_last=False, **widths)


def upcycled() -> nn.Module:
    model = upcycle(resnet(), layers=1.0, num_experts=3, patch_size=2, example=torch.randn(1, 3, SIDE, SIDE))
    for module in model.modules():
        if isinstance(module, SharedConv2d):
            nn.init.normal_(module.difference, std=0.1)
    return model


SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "PCELayer": lambda: PCELayer(3, 6, patch_size=4, num_experts=3, border="exchange"),
    "PCELayer, dropout": lambda: PCELayer(3, 6, patch_size=4, num_experts=3, top_k=2, border="exchange", dropout=0.1),
    "PCELayer, odd": lambda: PCELayer(3, 6, patch_size=3, num_experts=3, shared_kernel=False),
    "PCEConv2d": lambda: PCEConv2d(3, 6, patch_size=4, num_experts=3),
    "upcycled": upcycled,
    "pce_nano": lambda: create_network("pce_nano", num_experts=3, **WIDTHS),
    "double_conv": lambda: double_conv(3, 6),
    "Conv2d": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "resnet": resnet,
    "dense_nano": lambda: create_network("dense_nano", **WIDTHS),
}
NETWORKS = pytest.mark.parametrize("kind", SUBJECTS)
WITH_EXPERTS = pytest.mark.parametrize(
    "kind", [k for k in SUBJECTS if k.startswith("PCE") or k in ("upcycled", "pce_nano")]
)
WITH_STATISTICS = pytest.mark.parametrize(
    "kind", [k for k in SUBJECTS if k != "PCELayer, dropout" and "Conv2d" not in k]
)


def make(kind: str) -> nn.Module:
    """In float64, after a few batches, so that no statistic is that of a fresh network."""
    return copy.deepcopy(made(kind))


@cache
def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = SUBJECTS[kind]().double()
    with torch.no_grad():
        for _ in range(2):
            model(batch())
    return model


def batch(seed: int | None = None, count: int = 4) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=generator) * 2 + 1


def step(model: nn.Module, seed: int = 0) -> None:
    """One of SGD, on all that is not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    with record_routing(model) as records:
        out = model(batch(seed))
    if parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.zero_grad()
        (out.square().mean() + aux_loss(records)).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def outputs(model: nn.Module, seed: int = 7) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(seed))


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, check_stride=False)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


# Statistics


class Moments:
    """Of what batch normalisations are given, expert by expert and batch by batch, worked out from hooks on them."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self.handles = [
            norm.register_forward_pre_hook(lambda m, args, n=name: self.note(n, m, args))
            for name, norm in batch_norms(model).items()
        ]

    def note(self, name: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        x, *places = args
        owners = by_pixel(x, *places[:2]) if places else torch.zeros(len(x), *x.shape[2:], dtype=torch.int64)
        for expert in owners.unique().tolist():
            values = x.permute(1, 0, 2, 3)[:, owners == expert]
            if expert >= 0 and values.shape[1] >= 2:
                self.found.setdefault((name, expert), []).append((values.mean(1), values.var(1)))


def by_pixel(x: Tensor, per_patch: Tensor, size: int) -> Tensor:
    """What each patch of a map has, at each of its pixels: ``[B, H, W]``."""
    batch, _, height, width = x.shape
    grid = per_patch.view(batch, -(-height // size), -(-width // size))
    return grid.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]


@WITH_STATISTICS
def test_update_bn_renews_the_statistics_of_every_expert(kind: str) -> None:
    model = make(kind)
    batches = [batch(1), batch(2), batch(3)]
    moments = Moments(model)
    update_bn(batches, model.eval())
    assert not model.training
    norms = batch_norms(model)
    assert norms
    assert {name for name, _ in moments.found} == norms.keys()
    for (name, expert), of_batches in moments.found.items():
        norm = norms[name]
        stacked = isinstance(norm, StackedBatchNorm)
        assert norm.momentum == 0.1
        for own, index in ((norm.running_mean, 0), (norm.running_var, 1)):
            expected = torch.stack([moment[index] for moment in of_batches]).mean(0)
            same(own[expert] if stacked else own, expected)
        assert (norm.num_batches_tracked[expert] if stacked else norm.num_batches_tracked) == len(of_batches)


def test_update_bn_against_moments_worked_out_from_the_map() -> None:
    """The first convolution on the whole map, of which each patch's pixels are its expert's."""
    layer = PCELayer(3, 6, patch_size=4, num_experts=3, border="exchange").double()
    x = batch(1)
    with record_routing(layer) as records:
        update_bn([x], layer)
    routing = records[""][0]
    choice = routing.expert_ids[:, 0].view(routing.grid).repeat_interleave(4, 1).repeat_interleave(4, 2)
    kept = routing.dispatch_mask[:, 0].view(routing.grid).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for expert in range(3):
        hidden = F.conv2d(x, layer.experts.conv1.weight[expert], padding=1).permute(1, 0, 2, 3)
        own = hidden[:, (choice == expert) & kept]
        same(layer.experts.norm1.running_mean[expert], own.mean(1))
        same(layer.experts.norm1.running_var[expert], own.var(1))


def test_an_expert_without_patches_counts_no_batch() -> None:
    layer = PCELayer(3, 4, patch_size=4, num_experts=2, balancing="none", capacity_factor=None)
    layer = layer.double()
    with torch.no_grad():
        layer.router.logits.weight.zero_()
        layer.router.logits.bias.copy_(torch.tensor([1.0, 0.0]))
    update_bn([batch(1), batch(2)], layer)
    assert layer.experts.norm1.num_batches_tracked.tolist() == [2, 0]
    assert layer.experts.norm1.running_mean[1].tolist() == [0.0] * 4
    assert layer.experts.norm2.running_var[1].tolist() == [1.0] * 4


@NETWORKS
def test_averaged_model(kind: str) -> None:
    model = make(kind)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    first = state(model)
    step(model)
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        same(parameter.detach(), (first[name] + model.get_parameter(name).detach()) / 2)
    update_bn([batch(1)], averaged)
    for norm in batch_norms(averaged).values():
        assert norm.num_batches_tracked.max() == 1
    assert outputs(averaged).isfinite().all()


@NETWORKS
def test_timms_moving_average(kind: str) -> None:
    model = make(kind)
    first = state(model)
    average = ModelEmaV3(model, decay=0.75, foreach=False)
    step(model)
    average.update(model)
    for name, now in model.state_dict().items():
        expected = 0.75 * first[name] + 0.25 * now if now.is_floating_point() else now
        same(average.module.state_dict()[name], expected)
    torch_average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    torch_average.update_parameters(model)
    same(outputs(torch_average), outputs(model))


@WITH_STATISTICS
@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_synchronised_statistics_of_one_process_are_its_own(kind: str, convert: Callable[..., nn.Module]) -> None:
    model = make(kind)
    twin = copy.deepcopy(model)
    names = model.state_dict().keys()
    converted = convert(twin)
    assert converted.state_dict().keys() == names
    for norm in batch_norms(converted).values():
        assert isinstance(norm, nn.SyncBatchNorm) or norm.synchronised
    same(outputs(converted), outputs(model))
    if not any(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(converted).values()):  # those need a GPU
        step(converted.train())
        step(model.train())
        reference.assert_same(state(converted), state(model), rtol=1e-9, atol=1e-9)


def test_statistics_of_experts_are_synchronised_by_all_processes_or_none() -> None:
    with pytest.raises(ValueError, match=r"process_group: the statistics of norm1, of 3 experts, are .* leave it out"):
        nn.SyncBatchNorm.convert_sync_batchnorm(make("PCELayer"), process_group=object())


@WITH_STATISTICS
def test_resetting_statistics(kind: str) -> None:
    model = make(kind)
    for norm in batch_norms(model).values():
        norm.reset_running_stats()
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
        assert not norm.num_batches_tracked.any()


@WITH_STATISTICS
def test_momentum_and_eps_are_those_that_are_set(kind: str) -> None:
    model = make(kind)
    moments = Moments(model)
    for norm in batch_norms(model).values():
        norm.momentum = 1.0
    model.train()(batch(1))
    for (name, expert), of_batches in moments.found.items():
        norm = model.get_submodule(name)
        mean, variance = of_batches[-1]
        same(norm.running_mean[expert] if isinstance(norm, StackedBatchNorm) else norm.running_mean, mean)
        same(norm.running_var[expert] if isinstance(norm, StackedBatchNorm) else norm.running_var, variance)
    for norm in batch_norms(model).values():
        norm.eps = 3.0
        norm.reset_parameters()
    seen: list[Tensor] = []

    def note(norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        expected = args[0] / 2  # sqrt(1 + 3)
        if isinstance(norm, StackedBatchNorm):
            x, expert, size, gelu, *others = args
            gate, residual = others or (None, None)
            expected = F.gelu(expected) if gelu else expected
            served = (expert >= 0).to(out.dtype)
            expected = expected * by_pixel(x, served if gate is None else served * gate, size)[:, None]
            expected = expected if residual is None else expected + residual
        same(out, expected)
        seen.append(out)

    for norm in batch_norms(model).values():
        norm.register_forward_hook(note)
    outputs(model)
    assert len(seen) == len(batch_norms(model))


# Freezing


@NETWORKS
def test_what_is_frozen_and_evaluated_stays_what_it_was(kind: str) -> None:
    model = make(kind).requires_grad_(False).eval()
    before = state(model)
    step(model)
    reference.assert_same(state(model), before, rtol=0, atol=0)


@WITH_STATISTICS
def test_evaluated_batch_norms_inside_a_network_in_training(kind: str) -> None:
    model = make(kind).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    before = state(model)
    step(model)
    after = state(model)
    frozen = [f"{n}.{t}".lstrip(".") for n, norm in batch_norms(model).items() for t in norm.state_dict()]
    reference.assert_same({n: after[n] for n in frozen}, {n: before[n] for n in frozen}, rtol=0, atol=0)
    assert any(not torch.equal(after[name], before[name]) for name in before)


@NETWORKS
def test_lightning_freezes_all(kind: str) -> None:
    model = make(kind).train()
    before = state(model)
    BaseFinetuning.freeze(model, train_bn=False)
    step(model)
    reference.assert_same(state(model), before, rtol=0, atol=0)


@WITH_STATISTICS
def test_without_tracked_statistics_training_normalises_by_the_batch(kind: str) -> None:
    model = make(kind).train()
    expected = copy.deepcopy(model)(batch(1))
    for norm in batch_norms(model).values():
        norm.track_running_stats = False
    before = state(model)
    same(model(batch(1)), expected)
    after = {name: tensor for name, tensor in state(model).items() if "expert_bias" not in name}
    reference.assert_same(after, {name: before[name] for name in after}, rtol=0, atol=0)


@WITH_EXPERTS
def test_a_router_can_be_frozen_alone(kind: str) -> None:
    for freeze in (lambda router: router.eval(), lambda router: router.requires_grad_(False)):
        model = make(kind).train()
        routers = {f"{name}.router".lstrip("."): router for name, router in routers_of(model)}
        for router in routers.values():
            freeze(router.requires_grad_(False))
        before = state(model)
        step(model)
        after = state(model)
        frozen = [f"{name}.{tensor}" for name, router in routers.items() for tensor in router.state_dict()]
        reference.assert_same({n: after[n] for n in frozen}, {n: before[n] for n in frozen}, rtol=0, atol=0)
        assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_bias_moves_where_weights_are_no_parameters(frozen: bool) -> None:
    """Within a pass DataParallel, and FSDP's first version, hold them as plain attributes."""
    plain = make("PCELayer").train()
    plain.router.requires_grad_(not frozen)
    held = copy.deepcopy(plain)
    for part in (held.router.hidden, held.router.logits):
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            setattr(part, name, weight * 1)
    before = plain.router.expert_bias.clone()
    for layer in (plain, held):
        layer(batch(1))
    assert torch.equal(held.router.expert_bias, plain.router.expert_bias)
    assert torch.equal(plain.router.expert_bias, before) == frozen


def test_a_pass_without_gradients_renews_the_bias_of_a_frozen_router() -> None:
    layer = make("PCELayer").requires_grad_(False).train()
    before = layer.router.expert_bias.clone()
    update_bn([batch(1)], layer)
    assert not torch.equal(layer.router.expert_bias, before)


@NETWORKS
def test_parameters_that_do_not_decay(kind: str) -> None:
    """By type, as many recipes have it; and by timm's rule with what a network lists."""
    model = make(kind)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)]
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    by_name = {n: id(p) for n, p in model.named_parameters() if "norm" in n.lower() or ".bn" in n}
    assert set(by_name.values()) <= of_norms
    listed = getattr(model, "no_weight_decay", tuple)()
    if kind in ("pce_nano", "dense_nano", "upcycled", "resnet"):
        decaying = [g for g in param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed) if g["weight_decay"]]
        assert not of_norms & {id(parameter) for group in decaying for parameter in group["params"]}


@NETWORKS
def test_dropout_switched_on_at_evaluation(kind: str) -> None:
    model = make(kind).eval()
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for drop in drops:
        drop.p = 0.5
        drop.train()
    differ = not torch.equal(outputs_as_is(model), outputs_as_is(model))
    assert differ == (
        kind in ("PCELayer", "PCELayer, dropout", "PCELayer, odd", "pce_nano", "double_conv", "dense_nano")
    )


def outputs_as_is(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(7))


# Resetting


@NETWORKS
def test_new_weights(kind: str) -> None:
    model = make(kind)
    before = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    for name, tensor in model.named_parameters():
        assert not (tensor == 9).any(), name
        if name.endswith("difference"):
            assert not tensor.any()
        elif tensor.ndim > 2:  # uniform with the spread of a plain convolution
            fan_in = tensor[0].numel() if tensor.ndim == 4 else tensor[0, 0].numel()
            assert tensor.abs().max() <= fan_in**-0.5, name
            assert tensor.std() > 0.3 * fan_in**-0.5, name
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            assert not buffer.any()
    assert state(model).keys() == before.keys()
    assert outputs(model).isfinite().all()


# Weights that are computed


def weights_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter that is no bias."""
    return [
        (m, n) for m in model.modules() for n in list(m._parameters) if m._parameters[n] is not None and n != "bias"
    ]


@NETWORKS
@pytest.mark.parametrize("everything", [False, True])
def test_pruning(kind: str, everything: bool) -> None:
    """What a mask leaves is what is used, in a second step and after loading, too."""
    model, other, by_hand = make(kind), make(kind), make(kind)
    first = weights_of(model) if everything else convolutions_and_linears(model)
    second = weights_of(other) if everything else convolutions_and_linears(other)
    plain = weights_of(by_hand) if everything else convolutions_and_linears(by_hand)
    for (module, name), (twin, _), (hand, _) in zip(first, second, plain, strict=True):
        mask = (torch.rand_like(getattr(module, name)) > 0.3).double()
        prune.custom_from_mask(module, name, mask)
        prune.l1_unstructured(twin, name, 0.5)
        with torch.no_grad():
            getattr(hand, name).mul_(mask)
    same(outputs(model), outputs(by_hand))
    for index in range(2):
        step(model.train(), index)
    other.load_state_dict(model.state_dict())
    same(outputs(other), outputs(model))
    for module, name in first:
        mask = getattr(module, f"{name}_mask")
        assert not (getattr(module, name) * (1 - mask)).any()
        prune.remove(module, name)
    same(outputs(model), outputs(other))


def convolutions_and_linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@NETWORKS
def test_parametrised_weights(kind: str) -> None:
    model, by_hand = make(kind), make(kind)
    for (module, name), (hand, _) in zip(weights_of(model), weights_of(by_hand), strict=True):
        parametrize.register_parametrization(module, name, Half())
        with torch.no_grad():
            getattr(hand, name).div_(2)
    same(outputs(model), outputs(by_hand))
    for index in range(2):
        step(model.train(), index)
    after = outputs(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    same(outputs(model), after)


@NETWORKS
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
def test_weight_normalisation_starts_as_the_same_network_and_trains(kind: str, norm: Callable[..., Any]) -> None:
    model = make(kind)
    expected = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module, name in weights_of(model):
            if getattr(module, name).norm() > 0:  # differences of experts that are 0 have no direction
                norm(module, name)
    same(outputs(model), expected)
    for index in range(2):
        step(model.train(), index)
    assert (outputs(model) - expected).abs().max() > 1e-6


@NETWORKS
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_spectral_normalisation(kind: str, norm: Callable[..., Any]) -> None:
    """The weights that are used have a largest singular value near 1, as a matrix of their first axis by the rest."""
    model = make(kind)
    parts = [(m, n) for m, n in weights_of(model) if getattr(m, n).ndim > 1 and getattr(m, n).norm() > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module, name in parts:
            norm(module, name, n_power_iterations=30)
    for index in range(2):
        step(model.train(), index)
    outputs(model)
    for module, name in parts:
        assert torch.linalg.matrix_norm(getattr(module, name).flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@WITH_EXPERTS
def test_reading_an_expert_of_pruned_ones_gives_what_is_used_and_writing_says_what_to_do(kind: str) -> None:
    for layer in make(kind).modules():
        if not isinstance(layer, PCELayer):
            continue
        conv = layer.experts.conv1
        name = "difference" if isinstance(conv, SharedConv2d) else "weight"
        prune.random_unstructured(conv, name, 0.5)
        block = layer.experts.to_sequential(1)
        with torch.no_grad():
            getattr(conv, f"{name}_orig").zero_()
        assert torch.equal(layer.experts.to_sequential(1)[0].weight, conv()[1])
        with pytest.raises(ValueError, match=f"{name} of a .*Conv2d is computed .*prune.remove"):
            layer.experts.from_sequential(1, block)


# Hooks


@NETWORKS
def test_every_module_with_tensors_of_its_own_is_called(kind: str) -> None:
    model = make(kind)
    own = [m for m in model.modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    called, inputs = set(), {}
    for module in own:
        module.register_forward_hook(lambda m, args, out: called.add(m))
        module.register_forward_pre_hook(lambda m, args: inputs.update({m: args}))
    outputs(model)
    assert called == set(own)
    for module, args in inputs.items():
        takes_a_map = not isinstance(module, StackedConv2d | SharedConv2d)
        assert bool(args) == takes_a_map
        assert not args or args[0].abs().max() > 0


@NETWORKS
def test_hooks_on_all_modules_see_every_module(kind: str) -> None:
    model, called = make(kind), set()
    own = {m for m in model.modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]}
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: called.add(m))
    try:
        outputs(model)
    finally:
        handle.remove()
    assert own <= called


@NETWORKS
def test_hooks_that_change_what_passes(kind: str) -> None:
    """A hook that halves a convolution's output is a weight that is half as large."""
    model, by_hand = make(kind), make(kind)
    convs = nn.Conv2d | StackedConv2d | SharedConv2d
    for module, hand in zip(model.modules(), by_hand.modules(), strict=True):
        if isinstance(module, convs):
            module.register_forward_hook(lambda m, args, out: out / 2)
            with torch.no_grad():
                for parameter in hand.parameters():
                    parameter.div_(2)
    same(outputs(model), outputs(by_hand))


@NETWORKS
def test_backward_hooks_see_gradients(kind: str) -> None:
    model = make(kind).train()
    seen: dict[nn.Module, Tensor] = {}
    kinds = nn.Conv2d | nn.Linear | PCELayer | PCEConv2d
    if kind not in ("resnet", "upcycled"):  # whose activations work in place on what comes from normalisations
        kinds |= nn.BatchNorm2d | nn.GroupNorm
    watched = [module for module in model.modules() if isinstance(module, kinds)]
    for module in watched:
        module.register_full_backward_hook(lambda m, grads, outs: seen.update({m: outs[0]}))
    x = batch(1).requires_grad_()
    torch.manual_seed(3)
    model(x).square().mean().backward()
    assert seen.keys() == set(watched)
    assert all(grad.abs().max() > 0 for grad in seen.values())
    plain = make(kind).train()
    expected = batch(1).requires_grad_()
    torch.manual_seed(3)
    plain(expected).square().mean().backward()
    same(x.grad, expected.grad)


@NETWORKS
@pytest.mark.parametrize("training", [False, True])
def test_counting_flops(kind: str, training: bool) -> None:
    """The counter follows modules through both passes, by hooks on what they are given."""
    counts = []
    for backward in (False, True):
        model = make(kind).train(training)
        x = batch(1).requires_grad_()
        torch.manual_seed(3)
        with FlopCounterMode(display=False) as counter:
            out = model(x).square().mean()
            if backward:
                out.backward()
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1]
    plain = make(kind).train(training)
    expected = batch(1).requires_grad_()
    torch.manual_seed(3)
    plain(expected).square().mean().backward()
    same(x.grad, expected.grad)


# Adapting and exchanging


class Adapted(nn.Module):
    """A low-rank adapter: what it wraps, and a correction that starts as nothing."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        conv = isinstance(base, nn.Conv2d)
        self.down = (nn.Conv2d(inputs, 2, 1, bias=False) if conv else nn.Linear(inputs, 2, bias=False)).double()
        self.up = (nn.Conv2d(2, outputs, 1, bias=False) if conv else nn.Linear(2, outputs, bias=False)).double()
        self.stride = base.stride if conv else None
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        correction = self.up(self.down(x))
        if self.stride is not None:
            correction = F.interpolate(correction, out.shape[-2:])
        return out + correction


@NETWORKS
def test_adapters_around_convolutions_and_linear_layers(kind: str) -> None:
    model = make(kind).requires_grad_(False)
    expected = outputs(model)
    root = nn.ModuleDict({"model": model})
    adapters = []
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear) and getattr(child, "groups", 1) == 1:
                conv = isinstance(child, nn.Conv2d)
                sizes = (child.in_channels, child.out_channels) if conv else (child.in_features, child.out_features)
                adapters.append(Adapted(child, *sizes))
                setattr(parent, name, adapters[-1])
    model = root["model"]
    same(outputs(model), expected)
    before = {a: a.base.weight.clone() for a in adapters}
    for index in range(3):
        step(model.eval(), index)
    assert adapters
    assert all(torch.equal(a.base.weight, before[a]) for a in adapters)
    assert any(a.up.weight.abs().max() > 0 for a in adapters)


def test_a_correction_of_the_routers_logits_by_hand() -> None:
    layer = make("PCELayer").eval()
    before = layer.router.compute_logits(batch(1))
    layer.router.logits = Adapted(layer.router.logits, layer.router.logits.in_features, 3)
    hidden: list[Tensor] = []
    layer.router.hidden.register_forward_hook(lambda m, args, out: hidden.append(out))
    nn.init.ones_(layer.router.logits.up.weight)
    after = layer.router.compute_logits(batch(1))
    same(after - before, (hidden[0] @ layer.router.logits.down.weight.T).sum(1, keepdim=True).expand(-1, 3))


class Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any) -> Any:
        return self.base(*args)


@WITH_EXPERTS
@pytest.mark.parametrize("training", [False, True])
def test_any_part_can_be_wrapped(kind: str, training: bool) -> None:
    model = make(kind).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = copy.deepcopy(model)(batch(1))
    for layer in list(model.modules()):
        if isinstance(layer, PCELayer):
            for name in ("conv1", "norm1", "conv2", "norm2"):
                setattr(layer.experts, name, Wrapped(getattr(layer.experts, name)))
        elif isinstance(layer, PCEConv2d):
            layer.kernels = Wrapped(layer.kernels)
        elif isinstance(layer, Router):
            layer.hidden, layer.logits = Wrapped(layer.hidden), Wrapped(layer.logits)
    same(model(batch(1)), expected)


@pytest.mark.parametrize("name", ["norm1", "norm2", "conv1", "conv2"])
def test_a_part_of_another_kind_is_refused(name: str) -> None:
    experts = make("PCELayer").experts
    ordinary = nn.BatchNorm2d(6) if name.startswith("norm") else nn.Conv2d(6, 6, 3)
    for put in (lambda: setattr(experts, name, ordinary), lambda: experts.add_module(name, ordinary)):
        with pytest.raises(ValueError, match=rf"{name} is a \w+ of 3 experts, and no {type(ordinary).__name__} can"):
            put()
    other = make("PCELayer").experts
    setattr(experts, name, getattr(other, name))
    assert getattr(experts, name) is getattr(other, name)


# Copies


@NETWORKS
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(kind: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    model = make(kind)
    with record_routing(model) as records:
        twin = clone(model)
        outputs(twin)
        assert not records
    same(outputs(twin), outputs(model))
    before = outputs(model)
    step(twin.train())
    same(outputs(model), before)
    assert not torch.equal(outputs(twin), before)
    assert not records, "a copy goes on recording"


@NETWORKS
def test_files_of_before_batches_were_counted_load_strictly(kind: str, tmp_path: Any) -> None:
    model = make(kind).eval()
    expected = outputs(model)
    old = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    same(outputs(loaded(kind, lambda other: other.load_state_dict(dict(old)))), expected)
    torch.save(old, tmp_path / "old.pt")
    same(outputs(loaded(kind, lambda other: load_checkpoint(other, str(tmp_path / "old.pt")))), expected)
    with torch.device("meta"):
        other = SUBJECTS[kind]() if kind != "upcycled" else None
    if other is not None:
        other.load_state_dict(dict(old), assign=True)
        same(outputs(other), expected)
        assert all(not tensor.is_meta for tensor in other.state_dict().values())
    save_model(model, str(tmp_path / "new.safetensors"))
    same(outputs(loaded(kind, lambda other: load_model(other, str(tmp_path / "new.safetensors")))), expected)


def loaded(kind: str, load: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(99)
    other = SUBJECTS[kind]().double()
    load(other)
    for norm in batch_norms(other).values():
        assert norm.num_batches_tracked.dtype == torch.int64
    return other


@NETWORKS
def test_channels_last(kind: str) -> None:
    model = make(kind)
    expected = outputs(model)
    same(outputs(model.to(memory_format=torch.channels_last)), expected)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


# Function transforms


def functions(kind: str) -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    model = make(kind).eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def call(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,))

    return model, parameters, call


@NETWORKS
def test_functional_call(kind: str) -> None:
    model, parameters, call = functions(kind)
    moved = {name: value + 0.01 * torch.randn_like(value) for name, value in parameters.items()}
    actual = call(moved, batch(7))
    model.load_state_dict(moved, strict=False)
    same(actual, outputs(model))


@NETWORKS
def test_gradients_of_each_sample(kind: str) -> None:
    model, parameters, call = functions(kind)
    x = batch(1, count=3)

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return call(values, image[None]).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            same(actual[name][index], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


@NETWORKS
def test_directional_derivatives(kind: str) -> None:
    model, parameters, call = functions(kind)
    x, direction = batch(1, count=2), batch(2, count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on its first use
        out, actual = torch.func.jvp(lambda values: call(parameters, values), (x,), (direction,))
    same(out.detach(), outputs_of(model, x))
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((model(x.requires_grad_()) * weights).sum(), x)
    x = x.detach()
    same((weights * actual).sum().detach(), (gradient * direction).sum())
    if kind not in ("PCEConv2d", "upcycled"):  # their gate's gradient is not that of its value
        rate = 1e-6
        expected = (outputs_of(model, x + rate * direction) - outputs_of(model, x - rate * direction)) / (2 * rate)
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-5, check_stride=False)
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on its first use
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    same(tangent.detach(), actual.detach())


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@NETWORKS
def test_ensembles(kind: str) -> None:
    models = [make(kind).eval() for _ in range(3)]
    for seed, model in enumerate(models):
        step(model.train(), seed)
        model.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])

    def call(values: dict[str, Tensor], others: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (values, others), (x,))

    actual = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, batch(7))
    for index, model in enumerate(models):
        same(actual[index].detach(), outputs(model))


@WITH_STATISTICS
def test_transforms_in_training_need_networks_without_running_statistics(kind: str) -> None:
    """As for a dense network; that a router's bias cannot follow either is said in one sentence."""
    model, parameters, call = functions(kind)
    model.train()

    def loss(images: Tensor) -> Tensor:
        return call(parameters, images).square().sum()

    pairs = batch(1).unflatten(0, (2, 2))
    with pytest.raises((ValueError, RuntimeError), match=r"eval\(\)|running_mean"):
        torch.func.vmap(loss)(pairs)
    torch.func.replace_all_batch_norm_modules_(model)
    for _, router in routers_of(model):
        router.eval()
    actual = torch.func.vmap(loss)(pairs)
    same(actual, torch.stack([model(pair).square().sum() for pair in pairs]).detach())


@pytest.mark.parametrize("layer", [PCELayer, PCEConv2d])
def test_gradients_of_torch_func_in_training_say_what_to_do(layer: type[nn.Module]) -> None:
    model, x = layer(3, 8, patch_size=4).train(), torch.randn(2, 3, 16, 16)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"expert_bias cannot follow batches within a transform of torch\.func: call"):
        torch.func.grad(loss)(parameters)
    for module in model.modules():
        if isinstance(module, Router | nn.BatchNorm2d):
            module.eval()
    assert torch.func.grad(loss)(parameters).keys() == parameters.keys()


@pytest.mark.parametrize("exchange", [False, True])
def test_dropout_sees_activations_where_somebody_looks(exchange: bool) -> None:
    model, x = PCELayer(3, 8, patch_size=4).eval(), torch.randn(2, 3, 16, 16)
    expected, seen = model(x), []
    if exchange:
        model.experts.drop = nn.Identity()
    model.experts.drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    torch.testing.assert_close(model(x), expected)
    assert seen[0].shape[1] == 8
    assert seen[0].min() < 0 < seen[0].max()  # of GELU, not ones


@NETWORKS
def test_nothing_of_a_transform_outlives_it(kind: str) -> None:
    model, parameters, call = functions(kind)
    x = torch.randn(2, 3, 20, 12, dtype=torch.float64)  # a size that no other test has
    torch.func.grad(lambda values: call(values, x).sum())(parameters)
    model(x).sum().backward()


# What cannot be done


@WITH_EXPERTS
def test_tracing_is_refused_with_the_alternative(kind: str) -> None:
    model = make(kind).eval()
    alternative = r"torch\.jit\.trace would keep .* 'pcenet export', .*export_onnx, or take torch\.export"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: tracing is deprecated
        with pytest.raises(ValueError, match=alternative):
            torch.jit.trace(model, batch(1))
    if kind.startswith("PCE"):
        with pytest.raises(ValueError, match=r"torch\.fx cannot .* as leaf modules"):
            torch.fx.symbolic_trace(model)


@WITH_EXPERTS
def test_gradients_of_gradients(kind: str) -> None:
    """Of a penalty on the input's gradient, against differences of penalties in a random direction."""
    model = make(kind).eval()
    weights = [parameter for name, parameter in model.named_parameters() if "router" not in name]

    def penalty() -> Tensor:
        x = batch(1).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad.square().mean()

    grads = torch.autograd.grad(penalty(), weights)
    direction = [torch.randn_like(weight) for weight in weights]
    rate, found = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, part in zip(weights, direction, strict=True):
                weight.add_(part, alpha=sign * rate)
        found.append(penalty().detach())
    slope = sum((grad * part).sum() for grad, part in zip(grads, direction, strict=True))
    if kind == "upcycled":  # its gates' gradients are not those of their values
        assert slope.isfinite()
    else:
        torch.testing.assert_close(slope, (found[0] - found[1]) / (2 * rate), rtol=1e-4, atol=1e-4)


@WITH_EXPERTS
def test_attached_losses_under_transforms(kind: str) -> None:
    model, parameters, call = functions(kind)
    for _, router in routers_of(model):
        router.train()
        router.expert_bias = None
    plain = torch.func.grad(lambda v: call(v, batch(1)).sum())(parameters)
    with record_routing(model) as records:
        model(batch(1))
    named = dict(model.named_parameters())
    of_loss = torch.autograd.grad(aux_loss(records), list(named.values()), allow_unused=True)
    attach_aux_losses(model)
    actual = torch.func.grad(lambda v: call(v, batch(1)).sum())(parameters)
    for name, extra in zip(named, of_loss, strict=True):
        same(actual[name], plain[name] + (0 if extra is None else extra))
    torch.func.vmap(torch.func.grad(lambda v, x: call(v, x[None]).sum()), in_dims=(None, 0))(parameters, batch(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(lambda x: call(parameters, x), (batch(1),), (batch(2),))
