"""The U-shaped networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pcenet import complexity, load_model, record_routing
from pcenet.models import PCEUNet, create_network, input_size_of, list_models, model_options, task_of, twin_of
from pcenet.nn import PCELayer

DENSE = ["dense_unet_nano", "dense_unet_nano_position", "dense_unet_nano_wide", "dense_unet_tiny"]
NAMES = [*DENSE, "pce_unet_nano", "pce_unet_tiny"]


def images(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_names_tasks_and_twins():
    assert list_models("segment") == NAMES
    assert {task_of(name) for name in NAMES} == {"segment"}
    assert [twin_of(name) for name in NAMES] == [*[None] * len(DENSE), "dense_unet_nano", "dense_unet_tiny"]
    assert [input_size_of(name) for name in ("pce_unet_nano", "pce_nano")] == [(3, 192, 256), (3, 32, 32)]
    assert "patch_sizes" in model_options("pce_unet_nano")
    assert "global_pool" not in model_options("pce_unet_nano")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (37, 50), (8, 8), (1, 1)])
def test_any_size_gives_logits_of_that_size(name, height, width):
    model = create_network(name, num_classes=5).eval()
    with torch.no_grad():
        assert model(images(height, width)).shape == (2, 5, height, width)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_and_every_stage_is_routed_both_ways(name):
    model = create_network(name, num_classes=5).train()
    with record_routing(model) as records:
        model(images()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    stages = len(model.stages)
    layers = sum(isinstance(module, PCELayer) for module in model.modules())
    assert len(records) == layers
    depths = model.model_args["depths"]
    assert layers == (sum(depths) + sum(depths[:-1]) if name.startswith("pce") else 0)
    assert len(model.levels) == stages - 1


def test_the_way_up_mirrors_the_way_down():
    model = create_network("pce_unet_nano")
    down = [stage[-1].body.extractor.patch_size for stage in model.stages]
    up = [level.blocks[-1].body.extractor.patch_size for level in model.levels]
    assert down == [32, 8, 4]
    assert up == [8, 32]


def test_patches_cover_less_of_the_image_with_depth():
    for name in NAMES:
        arguments = create_network(name).model_args
        covered = [p * s for p, s in zip(arguments["patch_sizes"], arguments["strides"], strict=True) if p]
        assert covered == sorted(covered, reverse=True)
        assert not covered or covered[-1] < covered[0]


def test_forward_is_the_u_written_out():
    model = create_network("dense_unet_nano", num_classes=3).eval()
    x = images(30, 44)
    with torch.no_grad():
        first = model.stages[0](model.stem(x))
        second = model.stages[1](first)
        third = model.stages[2](second)
        assert [tuple(m.shape[1:]) for m in (first, second, third)] == [(24, 15, 22), (48, 8, 11), (96, 4, 6)]
        level = model.levels[0].project(third)
        up = model.levels[0].blocks(second + F.interpolate(level, size=(8, 11), mode="bilinear", align_corners=False))
        level = model.levels[1].project(up)
        up = model.levels[1].blocks(first + F.interpolate(level, size=(15, 22), mode="bilinear", align_corners=False))
        features = model.norm(up)
        assert torch.equal(model.forward_features(x), features)
        logits = F.interpolate(model.head(features), size=(30, 44), mode="bilinear", align_corners=False)
        assert torch.equal(model(x), logits)


def test_multiply_adds_by_hand():
    stem = 96 * 128 * 27 * 24
    down = 96 * 128 * 2 * 9 * 24**2 + 48 * 64 * (4 * 24 * 48 + 2 * 9 * 48**2) + 24 * 32 * (4 * 48 * 96 + 2 * 9 * 96**2)
    up = 24 * 32 * 96 * 48 + 48 * 64 * (2 * 9 * 48**2 + 48 * 24) + 96 * 128 * 2 * 9 * 24**2
    head = 96 * 128 * 24 * 11
    assert complexity(create_network("dense_unet_nano"), (3, 192, 256)).multiply_adds == stem + down + up + head


@pytest.mark.parametrize("name", ["pce_unet_nano", "pce_unet_tiny"])
def test_twins_cost_the_same(name):
    size = input_size_of(name)
    pce, dense = complexity(create_network(name), size), complexity(create_network(twin_of(name)), size)
    assert pce.multiply_adds - pce.router_multiply_adds == pytest.approx(dense.multiply_adds, rel=0.01)
    assert pce.router_share < 0.06
    assert pce.parameters > 3 * dense.parameters


def test_saved_and_loaded(tmp_path):
    model = create_network(
        "pce_unet_nano", num_classes=4, num_experts=2, pretrained_cfg_overlay={"input_size": (3, 64, 96)}
    )
    model.class_names = ["a", "b", "c", "d"]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, PCEUNet)
    assert (loaded.task, loaded.class_names) == ("segment", ["a", "b", "c", "d"])
    assert loaded.pretrained_cfg["input_size"] == (3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model.eval()(images()))


def test_normalisations_do_not_decay():
    model = create_network("pce_unet_nano")
    listed = model.no_weight_decay()
    assert {name for name, p in model.named_parameters() if ".norm" in name and p.ndim == 2} == listed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_sizes": (4, 8, 2)}, ValueError, "shrink strictly"),
        ({"num_expert": 2}, TypeError, "PCEUNet got unexpected arguments"),
        ({"patch_sizes": (None, None, None), "top_k": 2}, ValueError, "no effect on a dense network"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        create_network("pce_unet_nano", **arguments)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'pce_unet_nono' is not a network"):
        create_network("pce_unet_nono")
