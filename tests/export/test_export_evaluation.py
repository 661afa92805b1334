"""The evaluation form computes what the network does."""

import copy

import pytest
import timm
import torch
from exporting import trained_like
from torch import nn
from torch.nn.utils import prune

from pcenet.exporting.evaluation import evaluation_form, fold_batch_norms, trace
from pcenet.models import create_network
from pcenet.nn import PCEConv2d, PCELayer
from pcenet.nn.conv import leaders_of
from pcenet.nn.stacked import SharedConv2d, StackedBatchNorm
from pcenet.upcycling import upcycle


@pytest.mark.parametrize("size", [(16, 16), (17, 22)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_sizes": (8, 2)},
        {"patch_sizes": (3, 1), "gate": "straight_through", "num_experts": 3},
        {"border": "halo", "top_k": 2, "num_experts": 3},
        {"border": "halo", "top_k": 2, "num_experts": 3, "gate": "straight_through"},
        {"border": "zero", "patch_sizes": (4, 2), "shared_kernel": False, "balancing": "none"},
        {"border": "zero", "patch_sizes": (3, 1)},
        {"border": "exchange", "top_k": 2, "num_experts": 3},
        {"border": "zero", "top_k": 2, "num_experts": 3},
        {"gate_input": "flat"},
        {"gate_input": "flat", "num_bands": 0},
        {"num_experts": 1},
    ],
    ids=str,
)
def test_a_classifier_is_the_same_in_evaluation_form(tiny, changes, size):
    model = tiny(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(3, 3, *size)
    form = evaluation_form(model, images)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)
    assert not [module for module in form.modules() if isinstance(module, SharedConv2d)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "left"), [("pce_unet_nano", 1), ("dense_unet_nano", 1), ("dense_nano", 1)])
def test_other_networks_are_the_same(name, left):
    model = trained_like(create_network(name, num_classes=3))
    images = torch.randn(2, 3, 40, 56)
    form = evaluation_form(model, images)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=2e-5)
    # The last normalisation follows a sum, not a convolution.
    dense = [
        each for each in form.modules() if isinstance(each, nn.BatchNorm2d) and not isinstance(each, StackedBatchNorm)
    ]
    assert len(dense) == left


def test_a_decoder_on_an_encoder_is_the_same():
    model = trained_like(create_network("unet:pce_nano_s2", num_classes=3))
    images = torch.randn(1, 3, 32, 48)
    form = evaluation_form(model, images)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)


def test_an_upcycled_network_is_the_same_and_followers_follow():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    upcycle(model, num_experts=3, example=images, layers=1.0)
    trained_like(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PCEConv2d):
                module.kernels.difference.copy_(0.05 * torch.randn_like(module.kernels.difference))
    assert leaders_of(model)
    form = evaluation_form(model, images)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_shortcut_of_its_own_is_the_same():
    torch.manual_seed(0)
    images = torch.randn(2, 6, 9, 8)
    for layer in (
        PCELayer(6, 6, patch_size=4),
        PCELayer(6, 4, patch_size=2),
        PCELayer(6, 4, patch_size=4, shortcut=False),
    ):
        form = evaluation_form(layer.eval())
        with torch.no_grad():
            torch.testing.assert_close(form(images), layer(images), rtol=1e-5, atol=1e-5)


def test_dropping_at_evaluation_is_refused():
    with pytest.raises(ValueError, match=r"eval_capacity_factor=1.5: .* load it with eval_capacity_factor=None"):
        evaluation_form(PCELayer(4, 4, patch_size=2, eval_capacity_factor=1.5))


def test_only_what_alone_reads_a_convolution_is_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.twice(x)
            return self.first(self.once(x)) + self.second(y) + y

    torch.manual_seed(0)
    model = Shared().eval()
    trained_like(model)
    images = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(images)
    assert fold_batch_norms(model, images) == 1
    assert isinstance(model.first, nn.Identity)
    assert isinstance(model.second, nn.BatchNorm2d)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_the_batch_are_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    images = torch.randn(2, 3, 8, 8)
    assert fold_batch_norms(copy.deepcopy(model), images) == 0
    assert torch.equal(evaluation_form(model, images)(images), model(images))


def test_weights_that_are_computed_are_taken_as_they_are_used():
    model = trained_like(create_network("pce_nano", num_classes=3, widths=(8, 12, 16))).requires_grad_(False)
    images = torch.randn(1, 3, 32, 32)
    layer = next(module for module in model.modules() if isinstance(module, PCELayer))
    prune.random_unstructured(layer.experts.conv1, "shared", 0.5)
    layer.experts.conv1.shared_orig.mul_(2)  # as loading does: what was computed before is of yesterday
    prune.random_unstructured(layer.router.hidden, "weight", 0.5)
    layer.router.logits = nn.Sequential(layer.router.logits)
    with torch.no_grad():
        form = evaluation_form(model, images)
        torch.testing.assert_close(form(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_program_holds_operators_of_torch_alone(tiny):
    images = torch.randn(3, 3, 16, 16)
    model = tiny()
    program = trace(evaluation_form(model, images), images, {0: torch.export.Dim("batch")})
    assert not [node for node in program.graph.nodes if "pcenet" in str(node.target)]
    other = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)


def test_eps_is_that_of_the_network():
    model = trained_like(create_network("pce_nano", num_classes=3, widths=(8, 12, 16)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(evaluation_form(model, images)(images), model(images), rtol=1e-4, atol=1e-4)
