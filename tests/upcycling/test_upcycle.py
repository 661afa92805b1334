"""Converting networks: the same function before and after, what is left alone, and that experts part in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pcenet
from pcenet.models import create_network
from pcenet.nn import PCEConv2d, PCELayer, aux_loss, record_routing
from pcenet.upcycling import Upcycling, rebuild

NARROW = (8, 16, 24, 32)
EXAMPLE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """A network with statistics, scales and shifts as training leaves them: none is 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(0.5 + noise)
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.copy_(0.6 * noise - 0.3)
    return model.eval()


def resnet18(**options: Any) -> nn.Module:
    return trained(timm.create_model("resnet18", num_classes=10, channels=NARROW, **options))


def narrow_vgg() -> nn.Module:
    """Convolutions with biases, each followed by an activation in place."""
    features = torchvision.models.vgg.make_layers([8, "M", 16, 16, "M", 16, 16, "M"], batch_norm=False)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def torchvision_blocks() -> nn.Module:
    """The residual blocks of torchvision's resnet18, narrow."""
    blocks = [torchvision.models.resnet.BasicBlock(8, 8) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tensors(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # and how many convolutions there are to convert, counted by hand: all 3x3 ones of stride 1 in one group
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=10, channels=NARROW), 13),
    "timm resnet26": (lambda: timm.create_model("resnet26", num_classes=10, channels=NARROW), 5),
    "timm resnetv2": (lambda: timm.create_model("resnetv2_18", num_classes=10, channels=NARROW), 13),
    "timm test_resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 6),
    "timm test_byobnet": (lambda: timm.create_model("test_byobnet", num_classes=10), 1),
    "timm test_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=10), 1),
    "torchvision blocks": (torchvision_blocks, 4),
    "torchvision vgg": (narrow_vgg, 5),
}


def check_same_function(make: Callable[[], nn.Module], converted: int) -> None:
    model = trained(make())
    before = copy.deepcopy(model)
    images = [torch.randn(2, 3, *size) for size in ((64, 64), (50, 75))]
    assert pcenet.upcycle(model, layers=1.0, example=EXAMPLE) is model
    assert len(model.upcycling.converted) == converted
    assert sum(isinstance(module, PCEConv2d) for module in model.modules()) == converted
    for x in images:
        assert distance(before, model, x) < 1e-5
    # In training, where normalisation by few values enlarges what is rounded.
    before, model = before.double().train(), model.double().train()
    for module in (*before.modules(), *model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what it drops depends on the order of the map's axes in memory
    assert distance(before, model, images[1].double()) < 1e-10


@torch.no_grad()
def distance(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    """Of the outputs, by the largest of them."""
    pairs = zip(tensors(before(x)), tensors(after(x)), strict=True)
    return max(float((actual - expected).abs().max() / expected.abs().max()) for expected, actual in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_function_before_and_after(name: str) -> None:
    check_same_function(*NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "converted"),
    [
        (lambda: timm.create_model("resnet50"), 13),
        (lambda: torchvision.models.resnet18(), 13),
        (lambda: timm.create_model("densenet121"), 58),
        # layer1 3, layer2 3, the first of layer3, and the head's; the others are dilated
        (lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None), 8),
        # and a convolution for each of four maps of the pyramid
        (
            lambda: torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
                backbone_name="resnet18", weights=None
            ),
            17,
        ),
    ],
)
def test_the_same_function_of_large_networks(make: Callable[[], nn.Module], converted: int) -> None:
    check_same_function(make, converted)


def test_blocks_share_a_router_and_patches_shrink_with_the_map() -> None:
    """resnet18 at 64 px has maps of 16, 8, 4 and 2 px; the deeper half of its 7 blocks of routers is layers 3 and 4."""
    model = pcenet.upcycle(resnet18(), layers=1.0, patch_size=8, example=EXAMPLE)
    found = {layer.name: (layer.map_size[0], layer.patch_size, layer.leader) for layer in model.upcycling.converted}
    assert found == {
        "layer1.0.conv1": (16, 8, None),
        "layer1.0.conv2": (16, 8, "layer1.0.conv1"),
        "layer1.1.conv1": (16, 8, None),
        "layer1.1.conv2": (16, 8, "layer1.1.conv1"),
        "layer2.0.conv2": (8, 4, None),
        "layer2.1.conv1": (8, 4, None),
        "layer2.1.conv2": (8, 4, "layer2.1.conv1"),
        "layer3.0.conv2": (4, 2, None),
        "layer3.1.conv1": (4, 2, None),
        "layer3.1.conv2": (4, 2, "layer3.1.conv1"),
        "layer4.0.conv2": (2, 1, None),
        "layer4.1.conv1": (2, 1, None),
        "layer4.1.conv2": (2, 1, "layer4.1.conv1"),
    }
    with record_routing(model) as records:
        model(EXAMPLE)
    assert set(records) == {name for name, (*_, leader) in found.items() if leader is None}
    assert {routings[0].grid[1:] for routings in records.values()} == {(2, 2)}


def test_the_default_is_the_deeper_half_and_says_so() -> None:
    model = pcenet.upcycle(resnet18(), example=EXAMPLE)
    record = model.upcycling
    names = [layer.name for layer in record.converted]
    assert names == [f"layer{n}.{rest}" for n in (3, 4) for rest in ("0.conv2", "1.conv1", "1.conv2")]
    assert [layer.patch_size for layer in record.converted] == [2, 2, 2, 1, 1, 1]
    text = str(record)
    assert "converted 6 convolutions to 4 experts each, the deepest 50% of the blocks" in text
    assert "layer3.1.conv2  map 4 x 4, patches 2 x 2, router of layer3.1.conv1" in text
    assert "layer2.0.conv1, layer3.0.conv1, layer4.0.conv1: stride=(2, 2) is not 1" in text
    assert record.left["layer1.0.conv1"] == "not among the layers that were chosen"
    assert "routers are untrained" in text


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("layer4", ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]),
        (["layer3.*.conv1", "layer4.1.conv2"], ["layer3.1.conv1", "layer4.1.conv2"]),
        (0.01, ["layer4.1.conv1", "layer4.1.conv2"]),
    ],
)
def test_layers_by_names_patterns_and_depth(layers: Any, expected: list[str]) -> None:
    model = pcenet.upcycle(resnet18(), layers=layers, example=EXAMPLE)
    assert [layer.name for layer in model.upcycling.converted] == expected


def test_what_patches_do_not_fit_is_left_alone() -> None:
    """Patches of 2 on the map of 8 px are 1 on that of 4, and half a pixel on that of 2."""
    model = pcenet.upcycle(resnet18(), layers=["layer2", "layer3", "layer4"], patch_size=2, example=EXAMPLE)
    assert {layer.name[:6] for layer in model.upcycling.converted} == {"layer2", "layer3"}
    reason = "its map has 1/4 of the finest one's side, and patches would have 0.5 px"
    assert model.upcycling.left["layer4.1.conv2"] == reason


def test_a_second_call_keeps_the_scale_of_patches() -> None:
    """layer4's maps have 2x2 pixels and layer3's 4x4: patches of 2 and of 4 cover the same part of the image."""

    def sizes(*calls: dict[str, Any]) -> dict[str, int]:
        model = resnet18()
        for options in calls:
            pcenet.upcycle(model, example=EXAMPLE, **options)
        return {layer.name.split(".")[0]: layer.patch_size for layer in model.upcycling.converted}

    assert sizes({"layers": "layer4"}, {"layers": "layer3"}) == {"layer3": 4, "layer4": 2}
    assert sizes({"layers": "layer3"}, {"layers": "layer4"}) == {"layer3": 2, "layer4": 1}
    assert sizes({"layers": ["layer3", "layer4"]}) == {"layer3": 2, "layer4": 1}
    assert sizes({"layers": "layer4"}, {"layers": "layer3", "patch_size": 4}) == {"layer3": 4, "layer4": 2}
    with pytest.raises(
        ValueError, match=r"patch_size=2: the patches .* before are as large as 4 pixels of the finest map"
    ):
        sizes({"layers": "layer4"}, {"layers": "layer3", "patch_size": 2})


def test_a_second_time_changes_nothing() -> None:
    model = pcenet.upcycle(resnet18(), example=EXAMPLE)
    before = {name: id(module) for name, module in model.named_modules()}
    record = model.upcycling
    pcenet.upcycle(model, example=EXAMPLE)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.upcycling == record
    assert "layer4.1.conv2" in [layer.name for layer in record.converted]
    pcenet.upcycle(model, layers="layer2", example=EXAMPLE)
    new = ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]
    assert [layer.name for layer in model.upcycling.converted] == [*new, *(layer.name for layer in record.converted)]
    assert set(model.upcycling.left) == set(record.left) - set(new)
    assert model.upcycling.chosen_by == f"{record.chosen_by}; then by name (layer2)"
    # The record makes the whole network again.
    again = rebuild(resnet18(), Upcycling.from_dict(model.upcycling.to_dict())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(EXAMPLE), model.eval()(EXAMPLE))
    with pytest.raises(
        ValueError, match=r"model was upcycled with .*'num_experts': 4.* all of its layers have the same"
    ):
        pcenet.upcycle(model, num_experts=2, layers="layer1", example=EXAMPLE)


def test_a_network_that_keeps_its_record_is_upcycled_by_itself() -> None:
    model = create_network("timm:resnet18", num_classes=3, channels=NARROW)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"a TimmNet is upcycled by its own method, model\.upcycle"):
        pcenet.upcycle(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


class Flat(nn.Module):
    """All of it in one module: maps of one size before halving and after enlarging, if their sides are even."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
        self.halve, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.enlarge(self.deep(self.halve(self.first(x)))))


def test_maps_that_are_of_one_size_for_some_images_alone_share_no_router() -> None:
    torch.manual_seed(0)
    model, images = Flat().eval(), torch.randn(1, 3, 21, 18)
    expected = model(images)
    pcenet.upcycle(model, layers=1.0, example=torch.randn(1, 3, 16, 16))
    assert [layer.leader for layer in model.upcycling.converted] == [None, None, None]
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_a_second_time_without_an_example() -> None:
    """The trial image has the channels of the first layer, which is a PCE convolution by then."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    assert len(pcenet.upcycle(model, layers=1.0).upcycling.converted) == 2
    assert len(pcenet.upcycle(model, layers=1.0).upcycling.converted) == 2
    pcenet.upcycle(nn.Sequential(PCELayer(5, 8, patch_size=4), nn.Conv2d(8, 8, 3, padding=1)), layers=1.0)


class Odd(nn.Module):
    """What must not be converted: each convolution for another reason; `plain` alone is one like any other."""

    def __init__(self) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(3, 3, 3, padding=1)

        self.plain, self.twice, self.read, self.both, self.idle = (conv() for _ in range(5))
        self.tied, self.also_tied = conv(), conv()
        self.also_tied.weight = self.tied.weight
        self.named = conv()
        self.alias = self.named
        self.scaled = parametrizations.weight_norm(conv())
        self.dilated = nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.plain(x)))
        x = F.conv2d(x, self.read.weight, padding=1)
        x = self.both(x) + self.both.weight.mean()
        x = self.also_tied(self.tied(x))
        return self.grouped(self.dilated(self.scaled(self.alias(self.named(x)))))


def test_nothing_is_converted_wrongly() -> None:
    model = Odd()
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    pcenet.upcycle(model, layers=1.0, example=x)
    assert [layer.name for layer in model.upcycling.converted] == ["plain"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    left = model.upcycling.left
    assert left.pop("both").startswith("without it the network is not the same: AttributeError: 'PCEConv2d' object")
    unused = "it did not run in the trial pass; its weight may be used in another way"
    assert left == {
        "twice": "it runs 2 times in a pass",
        "read": unused,
        "idle": unused,
        "tied": "its weight is also that of also_tied",
        "also_tied": "its weight is also that of tied",
        "named": "it stands in several places: named, alias",
        "scaled": "its weight is parametrised",
        "dilated": "dilation=(2, 2) is not 1",
        "grouped": "groups=3 is not 1",
    }


def test_standardised_and_grouped_networks_are_refused_with_their_reasons() -> None:
    with pytest.raises(ValueError, match=r"no convolution can be converted: .*: it is a ScaledStdConv2d"):
        pcenet.upcycle(timm.create_model("test_nfnet"), example=EXAMPLE)
    with pytest.raises(ValueError, match="no convolution can be converted: the network has no 3x3 one"):
        pcenet.upcycle(timm.create_model("test_convnext"), example=EXAMPLE)
    with pytest.raises(ValueError, match="it is the whole network"):
        pcenet.upcycle(nn.Conv2d(3, 3, 3, padding=1), example=EXAMPLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0.0}, "layers=0.0 must be a share of the depth, above 0 and at most 1, or names"),
        ({"layers": True}, "layers=True must be a share"),
        ({"layers": "layer5"}, r"layers: 'layer5' is no 3x3 convolution of the network; did you mean 'layer\d"),
        ({"layers": "layer3.0.conv1"}, r"layer3.0.conv1, .*: stride=\(2, 2\) is not 1"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number and at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be"),
        ({"perturbation": -0.1}, "perturbation=-0.1 must be a number, and at least 0"),
        ({"freeze": "all"}, "freeze='all' is not one of 'dense', 'pretrained'"),
        ({"freeze": "pretrained", "shared_kernel": False}, "freeze='pretrained' needs shared_kernel=True"),
        ({"capacity_factor": 1.25}, "capacity_factor=1.25: no patch may be dropped"),
        ({"balancing": "some"}, "balancing='some' is not one of"),
        ({"example": torch.zeros(1, 4, 8, 8)}, "example: the network cannot be tried on it"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = resnet18()
    with pytest.raises(ValueError, match=message):
        pcenet.upcycle(model, **({"example": EXAMPLE} | arguments))
    assert not any(isinstance(module, PCEConv2d) for module in model.modules())
    assert not hasattr(model, "upcycling")


def test_unknown_options_are_type_errors() -> None:
    with pytest.raises(TypeError, match=r"unexpected options \['experts'\]; a router takes hidden, top_k"):
        pcenet.upcycle(resnet18(), example=EXAMPLE, experts=3)


def test_the_network_is_left_as_it_was_but_for_its_convolutions() -> None:
    model = resnet18().train()
    model.layer1.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    pcenet.upcycle(model, example=EXAMPLE)
    assert model.training
    assert not model.layer1.training
    assert model.layer4[1].conv2.training
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items() if name in after)
    assert torch.equal(after["layer4.1.conv2.kernels.shared"], state["layer4.1.conv2.weight"])
    assert after["layer4.1.conv2.kernels.difference"].abs().max() == 0
    hooks = [hook for module in model.modules() for hook in (module._forward_hooks, module._forward_pre_hooks)]
    assert not any(hooks)


def test_perturbed_experts_and_other_gates_are_allowed_to_change_the_output() -> None:
    for options in ({"perturbation": 0.5}, {"gate": "prob"}):
        model = resnet18()
        expected = model(EXAMPLE)
        pcenet.upcycle(model, example=EXAMPLE, **options)
        assert len(model.upcycling.converted) == 6
        assert (model(EXAMPLE) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("freeze", [None, "dense", "pretrained"])
def test_experts_part_in_training_and_only_what_is_not_frozen_moves(freeze: Any) -> None:
    model = pcenet.upcycle(resnet18().train(), freeze=freeze, example=EXAMPLE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    for _ in range(2):
        with record_routing(model) as records:
            loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        (loss + aux_loss(records)).backward()
        optimiser.step()
    change = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    # Balancing would undo their gradient, of which rounding alone is left.
    still = {name for name in before if name.endswith("router.logits.bias")}
    assert all(change[name] < 1e-7 for name in still)
    moved = {name for name in before if change[name] > 0} - still
    new = {name for name in before if ".router." in name or name.endswith("difference")} - still
    kernels = {name for name in before if ".kernels." in name}
    expected = {None: set(before) - still, "dense": new | kernels, "pretrained": new}[freeze]
    assert moved == expected
    difference = model.layer4[1].conv2.kernels.difference
    assert all((difference[i] - difference[j]).abs().max() > 1e-6 for i in range(4) for j in range(i))


def test_the_record_makes_the_network_again() -> None:
    model = pcenet.upcycle(resnet18(), num_experts=3, top_k=2, num_bands=2, shared_kernel=False, example=EXAMPLE)
    saved = model.upcycling.to_dict()
    assert saved["options"]["balancing"] == "batch"  # defaults are in it
    with torch.device("meta"):
        skeleton = rebuild(timm.create_model("resnet18", num_classes=10, channels=NARROW), Upcycling.from_dict(saved))
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    again = rebuild(timm.create_model("resnet18", num_classes=10, channels=NARROW), Upcycling.from_dict(saved)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(EXAMPLE), model(EXAMPLE))
    assert again.layer4[1].conv2.follows(again.layer4[1].conv1)
    with pytest.raises(ValueError, match="the network has no layer layer9"):
        rebuild(resnet18(), Upcycling.from_dict({**saved, "converted": [{**saved["converted"][0], "name": "layer9"}]}))
    with pytest.raises(ValueError, match="layer layer3 is a Sequential, not a convolution"):
        rebuild(resnet18(), Upcycling.from_dict({**saved, "converted": [{**saved["converted"][0], "name": "layer3"}]}))
    with pytest.raises(ValueError, match="is no record of converted layers"):
        Upcycling.from_dict({"converted": [{"name": "layer3"}], "options": {}})
    with pytest.raises(ValueError, match="is no record of converted layers"):
        Upcycling.from_dict({**saved, "options": ["dispatch"]})


def test_a_record_of_before_options_were_removed() -> None:
    model = pcenet.upcycle(resnet18(), example=EXAMPLE)
    saved = model.upcycling.to_dict()
    old = saved | {"options": saved["options"] | {"dispatch": "static", "priority": "gate"}}
    assert Upcycling.from_dict(old).to_dict() == saved
    with pytest.raises(ValueError, match="upcycling: priority='order' was removed, 'gate' is all that is left"):
        Upcycling.from_dict(saved | {"options": saved["options"] | {"priority": "order"}})


def test_half_precision() -> None:
    model = resnet18().to(torch.bfloat16)
    expected = model(EXAMPLE.bfloat16()).float()
    pcenet.upcycle(model, example=EXAMPLE.bfloat16())
    assert len(model.upcycling.converted) == 6
    assert (model(EXAMPLE.bfloat16()).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_cost_is_that_of_the_network_before_and_the_routers() -> None:
    """Each of six kernels, 24 or 32 channels, is there four times; one of them is active; differences are stored apart
    from what they differ from."""
    model = resnet18()
    before = pcenet.complexity(model, (3, 64, 64))
    after = pcenet.complexity(pcenet.upcycle(model, example=EXAMPLE), (3, 64, 64))
    assert after.multiply_adds - after.router_multiply_adds == before.multiply_adds
    assert after.routed_multiply_adds == 3 * (16 * 24 * 24 + 4 * 32 * 32) * 9
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    kernels = 3 * (24 * 24 + 32 * 32) * 9
    assert after.parameters == before.parameters + 4 * kernels + routers
    assert after.active_parameters == before.active_parameters + routers
