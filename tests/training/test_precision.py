"""Precision, compiling and devices of a run, as far as they can be tested without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from trainers import classifying

import pcenet
from pcenet.cli import main
from pcenet.nn import PCEConv2d, Router, record_routing
from pcenet.runs.config import TrainConfig
from pcenet.runtime.device import resolve_device, resolve_precision, set_precision
from pcenet.tasks.classification import Classification
from pcenet.training.engine import compile_parts
from pcenet.training.run import train

CUDA = torch.device("cuda")


def linear() -> nn.Module:
    """A classifier of three classes on images of 3x2x2 pixels, without a PCE layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 2, 2), torch.arange(8) % 3


def test_gradients_in_float16_are_scaled_and_scaled_back() -> None:
    model = linear()
    trainer = classifying(model, TrainConfig(precision="fp16", label_smoothing=0))
    images, targets = batch()
    assert trainer.state.scaler.get_scale() > 1000
    # By hand: of the mean cross-entropy, (softmax - target) / n times the input.
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    wrong = torch.softmax(images.flatten(1).double() @ weight.T + bias, 1) - torch.eye(3)[targets]
    expected = torch.cat(((wrong.T @ images.flatten(1).double() / 8), wrong.mean(0)[:, None]), 1).norm()
    _, norm = trainer.backward([(0, (images, targets))], 1)
    assert float(norm) == pytest.approx(float(expected), rel=4 * torch.finfo(torch.float16).eps)


def test_a_scale_that_is_too_large_is_halved_and_the_step_left_out() -> None:
    trainer = classifying(linear(), TrainConfig(precision="fp16", lr=0.01))
    state, start = trainer.state, [p.detach().clone() for p in trainer.parameters]
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})
    trainer.optimizer_step([(0, batch())], 1)
    assert state.scaler.get_scale() == 2.0**39
    assert (state.step, state.skipped) == (1, 0)  # nothing that --skip-nonfinite counts
    assert all(torch.equal(p, before) for p, before in zip(trainer.parameters, start, strict=True))
    assert state.state_dict()["scaler"]["scale"] == 2.0**39
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**10})
    trainer.optimizer_step([(0, batch())], 1)
    assert not any(torch.equal(p, before) for p, before in zip(trainer.parameters, start, strict=True))


def test_what_is_not_finite_by_itself_ends_training_in_float16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = classifying(linear(), TrainConfig(precision="fp16"))
    monkeypatch.setattr("pcenet.training.loop.first_cause", lambda *_: "the input")  # whose files there are none of
    images, targets = batch()
    images[2, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^step 1, the input; "):
        trainer.optimizer_step([(0, (images, targets))], 1)


def test_steps_that_are_left_out_leave_the_scale_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = classifying(linear(), TrainConfig(precision="fp16", skip_nonfinite=3))
    monkeypatch.setattr("pcenet.training.loop.first_cause", lambda *_: "the input")
    images, targets = batch()
    for number in range(2):
        trainer.optimizer_step([(0, (torch.full_like(images, torch.inf), targets))], 1)
        assert trainer.state.skipped == number + 1
    trainer.optimizer_step([(0, (images, targets))], 1)
    assert trainer.state.skipped == 0


def test_a_gradient_that_no_scale_mends_is_not_left_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale falls to 1 and no further; then it is an error like any other."""
    trainer = classifying(linear(), TrainConfig(precision="fp16"))
    monkeypatch.setattr("pcenet.training.loop.first_cause", lambda *_: "the gradient")
    trainer.state.scaler.load_state_dict({**trainer.state.scaler.state_dict(), "scale": 4.0})
    trainer.parameters[0].register_hook(lambda grad: grad * torch.nan)
    for scale in (2.0, 1.0):
        trainer.optimizer_step([(0, batch())], 1)
        assert trainer.state.scaler.get_scale() == scale
    with pytest.raises(ValueError, match=r"the gradient; "):
        trainer.optimizer_step([(0, batch())], 1)


def test_other_precisions_scale_nothing() -> None:
    trainer = classifying(linear(), TrainConfig(precision="bf16"))
    assert not trainer.state.scaler.is_enabled()
    assert trainer.state.state_dict()["scaler"] == {}


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"compile": True}], ids=str)
def test_what_does_not_go_with_divided_weights(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"with strategy 'fsdp'"):
        TrainConfig(strategy="fsdp", **options)


def test_float16_and_divided_weights_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "--strategy", "fsdp", "--devices", "2", "--precision", "fp16", "--out", str(out)]) == 2
    assert not out.exists()
    assert "precision 'fp16' with strategy 'fsdp'" in capsys.readouterr().err


@pytest.fixture
def switches() -> Iterator[None]:
    """torch's own, put back."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("switches")
def test_float32_is_float32_on_a_gpu_and_tf32_all_of_it() -> None:
    for precision, allowed in (("fp32", False), ("tf32", True)):
        set_precision(precision, CUDA)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
        set_precision("tf32", torch.device("cpu"))  # a GPU's alone
        assert torch.backends.cudnn.allow_tf32 == allowed


def test_tf32_is_of_gpus() -> None:
    with pytest.raises(ValueError, match=r"^precision 'tf32' is of NVIDIA GPUs, and the device is cpu; use"):
        resolve_precision("tf32", torch.device("cpu"))
    if torch.version.cuda:
        assert resolve_precision("tf32", CUDA) == "tf32"


def test_the_gpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device 'mps': torch sees no GPU of a Mac; use --device cpu"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps").type == "mps"
    assert resolve_precision("auto", resolve_device("mps")) == "fp32"
    with pytest.raises(ValueError, match=r"^devices 2: a Mac has one GPU"):
        resolve_device("mps", 2)


def test_all_but_routers_is_compiled() -> None:
    model = pcenet.create_network("pce_nano", num_classes=3)
    names = list(model.state_dict())
    compile_parts(model)
    compiled = {name for name, part in model.named_modules() if part._compiled_call_impl is not None}
    assert "stages.1.1.body.experts" in compiled
    assert not any(name.startswith("stages.1.1.body.router") for name in compiled)
    # In no part that is compiled is there a router, and none is within another one.
    for name in compiled:
        assert not any(isinstance(part, Router) for part in model.get_submodule(name).modules())
        assert not any(other != name and name.startswith(f"{other}.") for other in compiled)
    assert list(model.state_dict()) == names
    with record_routing(model):
        pass


def test_what_follows_a_router_is_not_compiled_and_all_parts_have_room() -> None:
    model = pcenet.upcycle(timm.create_model("resnet18", num_classes=3), num_experts=2)
    compile_parts(model)
    parts = [part for part in model.modules() if part._compiled_call_impl is not None]
    assert len(parts) > 8  # torch compiles no more of one function unless it is told to
    assert torch._dynamo.config.recompile_limit >= len(parts)
    for part in parts:
        assert not any(isinstance(each, PCEConv2d) for each in part.modules())


def test_a_dense_network_is_compiled_whole() -> None:
    model = pcenet.create_network("dense_nano", num_classes=3)
    compile_parts(model)
    assert model._compiled_call_impl is not None


def test_compiling_without_a_compiler(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pcenet.training.preparation.find_compiler", lambda: None)
    assert main(["train", "--data", str(pictures), "--compile", "--out", str(tmp_path / "run")]) == 2
    assert "compile: torch.compile needs a C++ compiler; install g++, or" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, of its graph's inputs
def test_a_compiled_network_trains_like_another(pictures: Path, tmp_path: Path) -> None:
    rows = []
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        torch.compiler.reset()
        out = tmp_path / name
        settings = ["--data", str(pictures), "--epochs", "1", "--batch-size", "8", "--precision", "fp32"]
        assert main(["train", *settings, "--out", str(out), *options]) == 0
        header, row = (out / "logs" / "metrics.csv").read_text().splitlines()
        rows.append(dict(zip(header.split(","), row.split(","), strict=True)))
    assert float(rows[1]["train/loss"]) == pytest.approx(float(rows[0]["train/loss"]), rel=1e-3)
    assert pcenet.load_model(tmp_path / "compiled" / "model").num_classes == 3


def test_images_for_a_gpu_come_as_they_are_and_train_the_same(
    start: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the bytes are brought to it; here it is the processor, which then does what a GPU would."""
    weights = []
    for name, pinned in (("as usual", False), ("for a GPU", True)):
        config = start(name, epochs=1, mixup=0.2)
        load = Classification.train_loader

        def loader(*args: Any, pin_memory: bool, pinned: bool = pinned, load: Any = load, **options: Any) -> Any:
            made = load(*args, pin_memory=pinned, **options)
            made.pin_memory = False  # there is nothing to pin it for
            assert next(iter(made))[0].dtype == (torch.uint8 if pinned else torch.float32)
            return made

        with monkeypatch.context() as patch:
            patch.setattr(Classification, "train_loader", loader)
            train(config)
        weights.append(pcenet.load_model(config.folder / "model").state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
