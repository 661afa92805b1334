"""On a GPU, and skipped elsewhere: the layer equals the naive reference, and the commands run."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import reference
import timm
import torch
from torch import Tensor

import pcenet
from pcenet.cli import main
from pcenet.nn import PCELayer, aux_loss, record_routing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def train(data: Path, out: Path, *options: str, model: str = "pce_nano") -> dict[str, Any]:
    """A short training on the GPU; what it measured."""
    settings = ["--data", str(data), "--out", str(out), "--model", model, "--batch-size", "8", "--device", "cuda"]
    assert main(["train", *settings, *options]) == 0
    return dict(json.loads((out / "metrics.json").read_text()))


# Exact arithmetic: in float64 only the order of sums differs.


@pytest.mark.parametrize(
    ("border", "gate", "dispatch", "side"),
    list(
        itertools.product(("zero", "halo", "exchange"), ("prob", "straight_through"), ("sorted", "static"), (1, 2, 4))
    ),
)
@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
def test_the_layer_equals_the_reference(border: str, gate: str, dispatch: str, side: int, train_mode: bool) -> None:
    options: dict[str, Any] = {"border": border, "gate": gate, "dispatch": dispatch, "capacity_factor": 0.8}
    layer = PCELayer(4, 6, patch_size=side, num_experts=3, num_bands=2, router_hidden=5, **options).double()
    layer = reference.randomise(layer, 0).train(train_mode)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    expected = reference.run_layer(layer, x)
    gradients = reference.gradients(expected.output, x, layer)
    on_gpu = copy.deepcopy(layer).cuda()
    own = x.detach().cuda().requires_grad_()
    output, routing = on_gpu.forward_with_routing(own)
    assert output.is_cuda
    torch.testing.assert_close(output.cpu(), expected.output, rtol=1e-9, atol=1e-9, check_stride=False)
    assert routing.choice.tolist() == expected.choice
    assert routing.kept.tolist() == expected.kept
    found = reference.gradients(output, own, on_gpu)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-8, atol=1e-8, check_stride=False, msg=name)


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
    model = timm.create_model("pce_nano", num_classes=10).eval().cuda()
    images = torch.randn(16, 3, 32, 32, device="cuda")
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cuda", torch.bfloat16):
            actual = model(images).float()
    # Patches whose best experts tie within rounding go elsewhere, all others differ by bfloat16's 8 bits.
    assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("border", ["halo", "exchange"])
def test_static_dispatch_compiles_to_one_graph(border: str) -> None:
    layer = PCELayer(8, 8, patch_size=4, num_experts=4, border=border, dispatch="static").cuda()
    images = torch.randn(4, 8, 16, 16, device="cuda")
    expected = layer.eval()(images)
    actual = torch.compile(layer, fullgraph=True)(images)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3, check_stride=False)


# The commands


def test_training_learns_and_a_run_is_scored_again(pictures: Path, tmp_path: Path, capsys: Any) -> None:
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


def test_training_in_the_default_precision_with_workers_goes_on(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--epochs", "2", "--workers", "2", "--checkpoint-minutes", "0"]
    train(pictures, out, *options)
    saved = sorted((out / "checkpoints").glob("step-*"))
    assert saved
    again = train(pictures, tmp_path / "again", *options, "--resume", str(saved[0]))
    assert again["epochs"] == 2


def test_the_batch_size_is_found(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data", str(pictures), "--out", str(tmp_path / "run"), "--device", "cuda", "--workers", "0"]
    assert main(["train", *settings, "--find", "batch-size"]) == 0
    assert "batch" in capsys.readouterr().out


def test_the_doctor_names_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert torch.cuda.get_device_name(0).split()[-1] in capsys.readouterr().out


def test_a_batch_is_predicted_on_the_gpu(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "run", "--epochs", "1", "--workers", "0")
    rows, source = [], str(pictures / "val")
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        assert main(["predict", str(tmp_path / "run"), source, "--device", device, "--out", str(out)]) == 0
        rows.append(sorted(line.split(",")[0] for line in (out / "predictions.csv").read_text().splitlines()))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + 12


def test_the_bench_measures_the_gpu(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    options = ["--layers", "[4x16x16x4]", "--measures", "[forward,step]", "--borders", "[halo]", "--rounds", "3"]
    assert main(["bench", *options, "--device", "cuda", "--json", str(written)]) == 0
    report = json.loads(written.read_text())
    assert report["machine"]["processor"] == torch.cuda.get_device_name(0)
    assert all(record["ms"] > 0 for record in report["records"])
