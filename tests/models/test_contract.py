"""timm's contract over every registered network, and the twins."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

import pcenet
from pcenet.models import PCENet, complexity, list_models, model_options, twin_of
from pcenet.models.blocks import ResidualBlock
from pcenet.nn import PCELayer, record_routing

NAMES = ["dense_nano", "dense_small", "dense_tiny"] + [
    f"pce_{size}{suffix}" for size in ("nano", "small", "tiny") for suffix in ("", "_spec")
]
NAMES += [f"{kind}_{size}_s2" for kind in ("dense", "pce") for size in ("nano", "tiny")]
NAMES += ["dense_nano_condconv", "dense_nano_position", "dense_nano_wide"]
ROUTED = {"dense_nano": 0, "pce_nano": 2, "pce_nano_spec": 3}  # stages
NANO = list(ROUTED)


def create(name: str, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(name: str, batch: int = 2, side: int | None = None) -> torch.Tensor:
    side = side or (32 if "nano" in name else 64)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_the_registry_holds_the_networks():
    assert sorted(list_models("classify")) == sorted(NAMES)
    assert set(NAMES) <= set(timm.list_models())


def test_twins():
    assert {name: twin_of(name) for name in NAMES} == {
        "dense_nano": None,
        "dense_nano_condconv": None,
        "dense_nano_position": None,
        "dense_nano_s2": None,
        "dense_nano_wide": None,
        "dense_small": None,
        "dense_tiny": None,
        "dense_tiny_s2": None,
        "pce_nano": "dense_nano",
        "pce_nano_s2": "dense_nano_s2",
        "pce_nano_spec": "dense_nano",
        "pce_small": "dense_small",
        "pce_small_spec": "dense_small",
        "pce_tiny": "dense_tiny",
        "pce_tiny_s2": "dense_tiny_s2",
        "pce_tiny_spec": "dense_tiny",
    }


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_determinism(name):
    model = create(name, num_classes=7).eval()
    assert isinstance(model, PCENet)
    x = images(name)
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
        assert features.shape[:2] == (2, model.num_features)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert torch.equal(model(x), logits)
        assert torch.equal(copy.deepcopy(model)(x), logits)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", NANO)
def test_initial_weights_depend_on_the_seed_alone(name):
    first, second = create(name), create(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_and_every_used_expert_a_nonzero_one(name):
    model = create(name, num_classes=3).train()
    with record_routing(model) as records:
        model(images(name)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PCELayer)}
    assert records.keys() == layers.keys()
    for layer_name, layer in layers.items():
        served = records[layer_name][0].dispatched_counts > 0
        gradient = layer.experts.norm2.bias.grad.abs().sum(1)
        assert torch.equal(gradient > 0, served), layer_name


@pytest.mark.parametrize("name", NAMES)
def test_features_of_every_level(name):
    model = create(name, features_only=True).eval()
    x = images(name)
    outputs = model(x)
    assert len(outputs) == len(model.feature_info) >= 3
    reductions = {"nano": [1, 2, 4], "nano_s2": [2, 4, 8], "tiny_s2": [2, 4, 8, 16]}
    size = re.sub("_(spec|wide|position|condconv)$", "", name).partition("_")[2]
    assert model.feature_info.reduction() == reductions.get(size, [4, 8, 16, 32])
    for output, channels, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert output.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx", "dict"])
def test_feature_classes_agree(name, feature_cls):
    x = images(name)
    expected = create(name, features_only=True, out_indices=(0, 2)).eval()(x)
    found = create(name, features_only=True, out_indices=(0, 2), feature_cls=feature_cls).eval()(x)
    for one, other in zip(expected, found.values() if isinstance(found, dict) else found, strict=True):
        torch.testing.assert_close(one, other)


def test_intermediates():
    model = create("pce_nano").eval()
    x = images("pce_nano", side=30)
    with torch.no_grad():
        final, levels = model.forward_intermediates(x)
        assert [tuple(level.shape[1:]) for level in levels] == [(24, 30, 30), (48, 15, 15), (96, 8, 8)]
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(model.norm(levels[-1]), final)
        only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert len(only) == 1
        assert torch.equal(only[0], levels[1])
        with pytest.raises(ValueError, match="output_fmt='NLC'"):
            model.forward_intermediates(x, output_fmt="NLC")


def test_pruned_network_ends_at_the_level():
    model = create("pce_nano").eval()
    x = images("pce_nano")
    level = model.forward_intermediates(x, intermediates_only=True)[1]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert torch.equal(model(x), level)
    assert model.num_features == 48
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("name", NANO)
def test_classifier_and_pooling_options(name):
    x = images(name)
    assert create(name, num_classes=0).eval()(x).shape == (2, 96)
    assert create(name, num_classes=0, global_pool="").eval()(x).shape == (2, 96, 8, 8)
    assert create(name, in_chans=1).eval()(x[:, :1]).shape == (2, 10)
    model = create(name, global_pool="max").eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(pooled, model.forward_features(x).amax((2, 3)))
    model.class_names = list("abcdefghij")
    model.reset_classifier(4)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    assert model.get_classifier().weight.shape == (4, 96)
    assert model.class_names is None
    model.reset_classifier(4, "catavgmax")
    assert model.head_hidden_size == 192
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize("name", ["pce_nano", "dense_nano"])
def test_drop_rates_act_in_training_alone(name):
    x = images(name)
    plain = create(name).eval()(x)
    model = create(name, drop_rate=0.5, drop_path_rate=0.5)
    assert [block.drop_path.drop_prob for block in _blocks(model)[1:]] == [0.25, 0.5]
    assert isinstance(_blocks(model)[0].drop_path, torch.nn.Identity)
    assert torch.equal(model.eval()(x), plain)
    assert not torch.equal(model.train()(x), model.train()(x))


def _blocks(model: PCENet) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "drop_path")]


@pytest.mark.parametrize("name", ["pce_nano", "dense_nano"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for enable in (False, True):
        model = create(name).train()
        model.set_grad_checkpointing(enable)
        model(images(name)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", NANO)
def test_parameter_groups(name):
    model = create(name)
    names = {n for n, _ in model.named_parameters()}
    no_decay = model.no_weight_decay()
    assert no_decay <= names
    assert no_decay == {n for n in names if ".experts.norm" in n}
    undecayed, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_decay)
    shapes = {p.ndim for p in decayed["params"]}
    assert decayed["weight_decay"] == 0.05
    assert undecayed["weight_decay"] == 0
    assert shapes <= {2, 4, 5}
    assert sum(p.ndim == 2 for p in decayed["params"]) == 1 + ROUTED[name]  # the head's and the routers'
    for coarse, count in ((True, 5), (False, 7)):  # stem, stages (strides apart from blocks), head
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) == count, coarse
        assert sorted(name for group in groups.values() for name in group) == sorted(names)


@pytest.mark.parametrize("name", NANO)
def test_bfloat16_and_other_devices(name):
    model = create(name, dtype=torch.bfloat16).eval()
    assert model(images(name).bfloat16()).dtype == torch.bfloat16
    shapes = create(name, device="meta").train()
    assert all(t.is_meta for t in shapes.state_dict().values())
    assert shapes(images(name).to("meta")).shape == (2, 10)


@pytest.mark.parametrize("name", NANO)
def test_a_block_is_a_sum_with_nothing_after_it(name):
    for block in _blocks(create(name).eval()):
        first = block.body if isinstance(block.body, PCELayer) else block.body[0]
        x = torch.randn(2, first.in_channels, 8, 8)
        # Kernels may add the input and multiply by the gate with one rounding.
        torch.testing.assert_close(block(x), x + block.body(x), rtol=1e-6, atol=1e-6, check_stride=False)


def test_a_dropped_patch_passes_through_its_block_unchanged():
    block = _blocks(create("pce_nano", capacity_factor=0.5))[1]
    x = torch.randn(2, 48, 16, 16)
    with record_routing(block) as records:
        y = block(x)
    dropped = ~records["body"][0].dispatch_mask[:, 0]
    before, after = (block.body.extractor.split(t)[0] for t in (x, y))
    assert 0 < dropped.sum() < len(dropped)
    assert torch.equal(after[dropped], before[dropped])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_block_is_the_input_and_its_body_whoever_adds_them(drop_path, training):
    """A body that nobody watches adds the input itself; a hook on it sees the body's own output."""
    block = ResidualBlock(PCELayer(4, 4, patch_size=2, shortcut=False), drop_path).double().train(training)
    twin = copy.deepcopy(block)
    seen = []
    twin.body.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    plain = block(x)
    torch.manual_seed(0)
    watched = twin(x)
    torch.testing.assert_close(plain, watched, rtol=1e-12, atol=1e-12, check_stride=False)
    assert len(seen) == 1
    if not (drop_path and training):
        torch.testing.assert_close(watched, x + seen[0], rtol=1e-12, atol=1e-12, check_stride=False)


def test_layer_options_reach_every_layer():
    model = create("pce_nano", num_experts=3, border="exchange", gate="straight_through", dropout=0.1)
    layers = [m for m in model.modules() if isinstance(m, PCELayer)]
    assert [layer.extractor.patch_size for layer in layers] == [4, 1]
    for layer in layers:
        assert (layer.router.num_experts, layer.border, layer.router.gate) == (3, "exchange", "straight_through")
        assert (layer.experts.drop.p, layer.shortcut) == (0.1, None)


def test_two_experts_of_half_the_width_cost_as_much_as_one():
    one = create("pce_nano", border="halo", num_experts=4)
    two = create("pce_nano", border="halo", num_experts=8, top_k=2, expert_width=0.5)
    layers = [m for m in two.modules() if isinstance(m, PCELayer)]
    assert [tuple(layer.experts.conv1.difference.shape) for layer in layers] == [(8, 24, 48, 3, 3), (8, 48, 96, 3, 3)]
    assert [tuple(layer.experts.conv2.difference.shape) for layer in layers] == [(8, 48, 24, 3, 3), (8, 96, 48, 3, 3)]
    costs = [complexity(network, (3, 32, 32)) for network in (one, two)]
    assert costs[0].routed_multiply_adds == costs[1].routed_multiply_adds
    # Routers differ, by 4 more logits of perceptrons 16 and 24 wide, for 16 and for 64 patches.
    assert costs[1].multiply_adds - costs[0].multiply_adds == 4 * (16 * 16 + 64 * 24)


@pytest.mark.parametrize("width", [0, -0.5, float("nan"), float("inf"), "2"])
def test_an_expert_has_some_width(width):
    with pytest.raises(ValueError, match=rf"expert_width={width!r} must be a number above 0"):
        create("pce_nano", expert_width=width)


@pytest.mark.parametrize(("name", "factor"), [("pce_nano", 1.25), ("pce_nano_s2", 2.0), ("pce_tiny_s2", 2.0)])
def test_encoders_for_segmentation_give_experts_more_room(name, factor):
    layers = [m for m in create(name, device="meta").modules() if isinstance(m, PCELayer)]
    assert {layer.router.capacity_factor for layer in layers} == {factor}


def test_the_specification_to_the_letter():
    for layer in (m for m in create("pce_nano_spec").modules() if isinstance(m, PCELayer)):
        router = layer.router
        assert (layer.border, router.gate, router.top_k) == ("zero", "prob", 1)
        assert (router.capacity_factor, router.eval_capacity_factor) == (1.25, None)


def test_wrong_options_are_named():
    with pytest.raises(TypeError, match="experts"):
        create("pce_nano", experts=3)
    with pytest.raises(TypeError, match="experts"):
        create("dense_nano", experts=3)
    with pytest.raises(ValueError, match="num_experts: no effect on a dense network"):
        create("dense_nano", num_experts=3)
    with pytest.raises(TypeError, match="dispatch"):
        create("pce_nano", dispatch="static")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("pce")])
def test_patches_cover_less_of_the_image_in_the_last_routed_stage_than_in_the_first(name):
    args = create(name, device="meta").model_args
    covered = [s * p for s, p in zip(args["strides"], args["patch_sizes"], strict=True) if p is not None]
    assert covered == sorted(covered, reverse=True)
    assert covered[-1] < covered[0]


def test_model_options_are_taken():
    options = model_options("pce_nano")
    assert {"strides", "widths", "global_pool", "num_experts", "border", "top_k"} <= set(options)
    assert not {"self", "num_classes", "device", "layer_options", "shortcut", "patch_size"} & set(options)
    default = create("pce_nano").model_args
    assert create("pce_nano", **{name: default.get(name) for name in options}).model_args == default


def test_package_exports():
    assert pcenet.PCELayer is PCELayer
    assert set(pcenet.__all__) <= set(dir(pcenet))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pcenet.nothing  # noqa: B018
