"""The examples: short, and each learns something; and what attached losses assume of other people's training loops.
`make examples` runs those marked slow, too."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import pcenet

FOLDER = Path(__file__).parents[1] / "examples"
LINES = 40
# What each prints last, and bounds that only a network which has learnt keeps: of ten digits a guess finds a tenth, the
# commonest class of the scenes has a third of their pixels, and an untrained detector's losses add up to 3.1.
BOUNDS = {
    "timm_train": ("top-1", 0.5, 1.0),
    "lightning_module": ("top-1", 0.5, 1.0),
    "trainer": ("top-1", 0.5, 1.0),
    "segmentation_models": ("IoU", 0.4, 1.0),
    "detection": ("loss", 0.0, 2.5),
}


def test_all_are_short_and_tested() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py") if path.stem != "demo"}
    assert lengths.keys() == BOUNDS.keys()
    assert max(lengths.values()) <= LINES, lengths


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    what, least, most = BOUNDS[name]
    found = re.fullmatch(rf"{what} ([\d.]+)", done.stdout.strip().splitlines()[-1])
    assert found, done.stdout
    assert least < float(found[1]) < most, done.stdout


BALANCE, Z = 0.5, 0.1
IMAGES, LABELS = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return pcenet.create_network("pce_nano", num_classes=10, widths=(8, 8, 16))


def mean_gradients(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Of the loss and `aux_loss`, over batches that are accumulated for one step."""
    model = network()
    for images, labels in batches:
        with pcenet.record_routing(model) as records:
            loss = cross_entropy(model(images), labels)
        ((loss + pcenet.aux_loss(records, BALANCE, Z)) / len(batches)).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, of its own parts
def test_lightning_divides_its_loss_by_the_batches_that_it_accumulates() -> None:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()
            pcenet.attach_aux_losses(self.model, BALANCE, Z, scale=1 / 2)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_before_optimizer_step(self, _optimizer: torch.optim.Optimizer) -> None:
            self.found = [parameter.grad.clone() for parameter in self.model.parameters()]

    task, batches = Task(), list(zip(IMAGES.chunk(2), LABELS.chunk(2), strict=True))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=2, enable_model_summary=False, **options)
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    assert_equal(task.found, mean_gradients(batches))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # likewise
def test_hugging_faces_trainer_does_so_too(tmp_path: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(pixel_values)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
            found.extend(parameter.grad.clone() for parameter in model.parameters())

    class Watched(Trainer):
        def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *rest: object) -> Tensor:
            batches.append((inputs["pixel_values"], inputs["labels"]))
            return super().training_step(model, inputs, *rest)

    found: list[Tensor] = []
    batches: list[tuple[Tensor, Tensor]] = []
    wrapped = Wrapped()
    pcenet.attach_aux_losses(wrapped, BALANCE, Z, scale=1 / 2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        max_grad_norm=0.0, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
    Watched(wrapped, arguments, train_dataset=data, callbacks=[Gradients()]).train()
    assert len(batches) == 2
    assert_equal(found, mean_gradients(batches))


@pytest.mark.slow
def test_the_tour_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's cells, one after the other; the last network has learnt, and routing matters."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("pcenet.training.run.draw", lambda *_: None)
    cells = json.loads((FOLDER / "tour.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
    assert names["kept"] < 0.9
    assert names["result"].top1 > 0.8


@pytest.mark.slow
def test_the_demo_says_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = runpy.run_path(str(FOLDER / "demo.py"))
    monkeypatch.setitem(demo["RECIPE"], "epochs", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "200")
    demo["main"]()
    said = capsys.readouterr().out
    routed, twin, by_chance = (float(share) / 100 for share in re.findall(r"([\d.]+)%(?: of a street|: who)", said))
    assert min(routed, twin) > 0.9 > by_chance + 0.05
    assert {path.name for path in (tmp_path / "street").iterdir()} == {
        "street.png",
        "pce_unet_nano.png",
        "dense_unet_nano.png",
        "experts.png",
    }
    for name in demo["TRAINED"]:
        assert re.search(rf"{name} .* M ", said), said
    assert "pcenet explain" in said
