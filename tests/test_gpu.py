"""On a GPU, and skipped elsewhere: the layer equals the naive reference, and the commands run."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import timm
import torch
from exporting import trained_like
from torch import Tensor

import pcenet
from pcenet.cli import main
from pcenet.nn import PCELayer, aux_loss, record_routing
from pcenet.runtime.device import set_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def train(data: Path, out: Path, *options: str) -> dict[str, Any]:
    """A short training on the GPU; what it measured."""
    settings = ["--data", str(data), "--out", str(out), "--batch-size", "8", "--device", "cuda"]
    assert main(["train", *settings, *options]) == 0
    return dict(json.loads((out / "metrics.json").read_text()))


# Exact arithmetic: in float64 only the order of sums differs.

CASES: list[dict[str, Any]] = [
    *(
        {"border": border, "gate": gate, "patch_size": side}
        for border, gate, side in itertools.product(
            ("zero", "halo", "exchange"), ("prob", "straight_through"), (1, 2, 4)
        )
    ),
    {"border": "exchange", "top_k": 2, "patch_size": 2},
    {"border": "halo", "gate_input": "flat", "patch_size": 3},
]


@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_layer_equals_the_reference(options: dict[str, Any], train_mode: bool) -> None:
    sizes: dict[str, Any] = {"num_experts": 3, "num_bands": 2, "router_hidden": 5, "capacity_factor": 0.8}
    layer = reference.randomise(PCELayer(4, 6, **sizes, **options).double(), 0).train(train_mode)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    on_gpu = copy.deepcopy(layer).cuda()
    expected = reference.run_layer(layer, x)
    gradients = reference.gradients(expected.output, x, layer)
    own = x.detach().cuda().requires_grad_()
    output, routing = on_gpu.forward_with_routing(own)
    assert output.is_cuda
    torch.testing.assert_close(output.cpu(), expected.output, rtol=1e-9, atol=1e-9, check_stride=False)
    assert routing.expert_ids.tolist() == expected.expert_ids
    assert routing.dispatch_mask.tolist() == expected.dispatch_mask
    found = reference.gradients(output, own, on_gpu)
    reference.assert_same({name: grad.cpu() for name, grad in found.items()}, gradients, 1e-8, 1e-8)
    running = {k: v.cpu() for k, v in on_gpu.experts.state_dict().items() if "running" in k}
    reference.assert_same(running, expected.running)
    # The bias that balances is found by the layer itself.
    layer(x.detach())
    assert layer.router.expert_bias is not None
    assert on_gpu.router.expert_bias is not None
    torch.testing.assert_close(on_gpu.router.expert_bias.cpu(), layer.router.expert_bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_layer_in_float32_is_near_the_reference(options: dict[str, Any]) -> None:
    """Where kernels compute, they do so in this type."""
    set_precision("fp32", torch.device("cuda"))
    layer = reference.randomise(PCELayer(4, 6, num_experts=3, num_bands=2, router_hidden=5, **options), 0)
    x = torch.randn(2, 4, 7, 5)
    for train_mode in (True, False):
        on_gpu, exact = copy.deepcopy(layer).cuda().train(train_mode), copy.deepcopy(layer).double().train(train_mode)
        expected, routing = exact.forward_with_routing(x.double())
        own, found = on_gpu.forward_with_routing(x.cuda())
        assert torch.equal(found.expert_ids.cpu(), routing.expert_ids)
        torch.testing.assert_close(own.cpu().double(), expected, rtol=1e-4, atol=1e-4, check_stride=False)


@pytest.mark.parametrize("name", ["pce_nano", "pce_unet_nano"])
def test_a_network_and_its_losses_are_those_of_the_processor(name: str) -> None:
    size = 32 if name == "pce_nano" else 64
    model = pcenet.create_network(name, num_classes=5).double().train()
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    on_gpu = copy.deepcopy(model).cuda()

    def step(network: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with record_routing(network) as records:
            output = network(images)
        losses = aux_loss(records)
        (output.square().mean() + losses).backward()
        norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None])
        return output.detach().cpu(), losses.detach().cpu(), norm.cpu()

    for own, expected in zip(step(on_gpu, x.cuda()), step(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-9, check_stride=False)


def test_upcycling_keeps_the_function() -> None:
    dense = timm.create_model("resnet18", num_classes=10).double().eval().cuda()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, device="cuda")
    expected = dense(images)
    converted = pcenet.upcycle(copy.deepcopy(dense), num_experts=4).eval()
    torch.testing.assert_close(converted(images), expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_near_float32() -> None:
    model = trained_like(pcenet.create_network("pce_nano", num_classes=10)).cuda()
    images = torch.randn(64, 3, 32, 32, device="cuda")
    with torch.no_grad():
        with record_routing(model) as records:
            expected = model(images)
        with torch.autocast("cuda", torch.bfloat16), record_routing(model) as own:
            actual = model(images).float()
    same = torch.ones(len(images), dtype=torch.bool, device="cuda")
    for layer, (routing,) in records.items():
        same &= (own[layer][0].expert_ids == routing.expert_ids).view(len(images), -1).all(1)
    # Of hundreds of patches some few lie between two experts, where rounding decides.
    assert same.sum() > 8
    assert (actual - expected)[same].norm() < 0.03 * expected[same].norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("border", ["halo", "exchange"])
def test_a_layer_compiles_to_one_graph(border: str) -> None:
    torch.compiler.reset()
    layer = PCELayer(8, 8, patch_size=4, num_experts=4, border=border)
    layer = reference.randomise(layer, 0).eval().cuda()
    images = torch.randn(4, 8, 16, 16, device="cuda")
    expected = layer(images)
    actual = torch.compile(layer, fullgraph=True)(images)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3, check_stride=False)


# The commands


def test_training_learns_and_a_run_is_scored_again(pictures: Path, tmp_path: Path) -> None:
    metrics = train(pictures, tmp_path / "run", "--epochs", "6", "--precision", "fp32", "--workers", "0")
    # Three classes, each brightest in its colour: chance is a third.
    assert metrics["val"]["top1"] > 0.6
    for device, difference in (("cuda", 0), ("cpu", 1)):
        # On the processor float32 rounds differently: an image of 12 may fall to the other side.
        out = tmp_path / device
        assert main(["eval", str(tmp_path / "run"), "--device", device, "--precision", "fp32", "--out", str(out)]) == 0
        (written,) = out.glob("eval-*.json")
        score = json.loads(written.read_text())["top1"]
        assert abs(score - metrics["val"]["top1"]) <= difference / 12 + 1e-6


def test_training_in_the_default_precision_with_workers_goes_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--epochs", "2", "--workers", "2", "--checkpoint-minutes", "0"]
    train(pictures, out, *options)
    capsys.readouterr()
    within = out / "checkpoints" / "step-00000005"  # of 3 in each epoch
    again = train(pictures, tmp_path / "again", *options, "--resume", str(within))
    assert "after epoch 1, batch 2" in capsys.readouterr().out
    assert again["epochs"] == 2


def test_the_batch_size_is_found(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data", str(pictures), "--out", str(tmp_path / "run"), "--device", "cuda", "--workers", "0"]
    assert main(["train", *settings, "--find", "batch-size"]) == 0
    assert "suggestion: --batch-size 16\n" in capsys.readouterr().out  # the largest power of two of 24 images


def test_the_doctor_names_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert torch.cuda.get_device_name(0).split()[-1] in capsys.readouterr().out


def test_predictions_are_those_of_the_processor(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "run", "--epochs", "1", "--workers", "0")
    found = []
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        options = ["--device", device, "--precision", "fp32", "--out", str(out)]
        assert main(["predict", str(tmp_path / "run"), str(pictures / "val"), *options]) == 0
        predictions = json.loads((out / "predictions.json").read_text())["predictions"]
        found.append({each["file"]: each["probability"] for each in predictions})
    # Sums are made in another order, and a patch between two experts may go to either.
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert len(found[0]) == 12


def test_the_bench_measures_the_gpu(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    options = ["--layers", "[4x16x16x4]", "--measures", "[forward,step]", "--borders", "[halo]", "--rounds", "3"]
    assert main(["bench", *options, "--device", "cuda", "--json", str(written)]) == 0
    report = json.loads(written.read_text())
    assert report["machine"]["processor"] == torch.cuda.get_device_name(0)
    assert all(record["ms"] > 0 for record in report["records"])
