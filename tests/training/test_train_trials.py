"""What leaves no run, or a small one: dry runs, overfitting, the tuner."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet import ops
from pcenet.cli import main
from pcenet.data import EpochSampler, open_source
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.device import resolve_device
from pcenet.training import run as running
from pcenet.training.figures import Seen
from pcenet.training.find import find, find_batch_size, find_lr
from pcenet.training.loop import Trainer
from pcenet.training.preparation import Run, prepare, resolve
from pcenet.training.run import announce, train

Start = Callable[..., TrainConfig]


def prepared(config: TrainConfig, **arguments: Any) -> Run:
    device = resolve_device(config.device)
    return prepare(resolve(config, device), RunFolder(config.folder), device, **arguments)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Nine pictures of 32 x 32, dark over light, with masks."""
    root = tmp_path / "scenes"
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((32, 32), dtype=np.uint8)
            mask[10 + index :] = 1
            Image.fromarray(np.stack([mask * 200] * 3, axis=-1)).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


def command(config: TrainConfig, *more: str) -> list[str]:
    options = {"data": config.data, "out": config.out, "batch-size": config.batch_size, "precision": "fp32"}
    return ["train", *(f"--{name}={value}" for name, value in options.items()), "--device=cpu", "--workers=0", *more]


def test_some_of_the_training_images_and_all_of_val(start: Start) -> None:
    config = start(max_images=17, seed=3)
    run = prepared(config)
    whole = open_source(config.data, "train")
    first_epoch = [index for _, index in EpochSampler(len(whole), seed=3)]
    chosen = run.sources["train"]
    assert [chosen.file_name(i) for i in range(len(chosen))] == [whole.file_name(i) for i in first_epoch[:17]]
    assert len(run.sources["val"]) == 12
    assert len(run.loaders["train"]) == 2  # whole batches of 8


def test_a_dry_run_does_everything_with_two_batches_and_leaves_nothing(
    start: Start, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    original = Trainer.batch_loss
    monkeypatch.setattr(Trainer, "batch_loss", lambda self, *batch: steps.append(batch[1]) or original(self, *batch))
    written: set[str] = set()

    report = running.report

    def reporting(run: Run, model: Any, rows: Any, stopped: Any, epoch: int, result: Any, trackers: Any) -> None:
        written.update(path.name for path in run.folder.path.iterdir())
        assert result.images == 12  # all of them: fewer than two batches of eight
        report(run, model, rows, stopped, epoch, result, trackers)

    monkeypatch.setattr("pcenet.training.run.report", reporting)
    config = start()
    assert main(command(config, "--dry-run", "--epochs=7", "--max-time=9", "--early-stopping=3")) == 0
    assert steps == [0, 1]
    assert {"checkpoints", "logs", "model", "config.yaml"} <= written
    assert "dry run: everything works" in capsys.readouterr().out
    assert not config.folder.exists()
    assert list(temporary.iterdir()) == []


def test_a_run_says_once_that_it_is_on_the_reference(
    start: Start, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops.library, "_choice", ops.library.Choice(None, "for a reason"))
    line = "PCE layers run on the reference, about 1.5 times slower than kernels; for a reason\n"
    monkeypatch.setattr("pcenet.training.run.REFERENCE_COST", 1.5)
    announce(prepared(start()))
    assert capsys.readouterr().out.count(line) == 1
    announce(prepared(start(model="dense_nano")))
    monkeypatch.setattr(ops.library, "_choice", ops.library.Choice("avx2"))
    announce(prepared(start()))
    assert "reference" not in capsys.readouterr().out


def test_operators_that_cannot_be_had_end_a_run_before_it_begins(
    start: Start, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops.library, "_choice", None)
    monkeypatch.setenv("PCENET_OPS", "fast")
    config = start()
    assert main(command(config)) == 2
    assert "PCENET_OPS=fast: there is auto, required, reference" in capsys.readouterr().err
    assert not config.folder.exists()


def test_a_dry_run_of_segmentation(scenes: Path, temporary: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(scenes), out=str(tmp_path / "run"), batch_size=2, precision="fp32", device="cpu", workers=0
    )
    assert main(command(config, "--task=segment", "--input-size=32", "--dry-run", "--accumulate=2")) == 0
    assert not (tmp_path / "run").exists()
    assert list(temporary.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(
    start: Start, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start()
    config.folder.mkdir()
    (config.folder / "cat.jpg").write_bytes(b"cat")
    assert main(command(config, "--dry-run")) == 2
    assert "is never overwritten" in capsys.readouterr().err
    assert list(temporary.iterdir()) == []


def test_trials_are_not_for_train_itself(start: Start) -> None:
    for changes in ({"dry_run": True}, {"find": "lr"}):
        with pytest.raises(ValueError, match="dry_run and find leave no run"):
            train(start(**changes))


def test_overfitting_trains_and_validates_on_the_first_images_as_they_are(start: Start, pictures: Path) -> None:
    run = prepared(start(overfit=5, seed=4))
    order = [index for _, index in EpochSampler(24, seed=4)][:5]
    images = open_source(str(pictures), "train")
    expected = {run.sources["train"].file_name(i) for i in range(5)}
    assert expected == {images.file_name(index) for index in order}
    assert run.config.augment == "none"
    batches = {split: next(iter(loader)) for split, loader in run.loaders.items()}
    (seen, labels), (validated, targets) = batches["train"], batches["val"]
    assert labels.shape == (5,)
    # Shuffled for training, in order for validation, the same pixels.
    position = [int((validated == image).flatten(1).all(1).nonzero()) for image in seen]
    assert sorted(position) == list(range(5))
    assert torch.equal(targets[position], labels)


def test_overfitting_reaches_its_images(start: Start) -> None:
    options: dict[str, Any] = {"model": "dense_nano", "ema_decay": 0.5, "label_smoothing": 0.0, "warmup_epochs": 0.0}
    folder = train(start(overfit=4, epochs=8, **options))
    assert json.loads(folder.metrics.read_text())["val"] | {"loss": 0, "calibration_error": 0} == {
        "images": 4,
        "loss": 0,
        "top1": 1.0,
        "top5": None,
        "calibration_error": 0,
    }


def test_overfitting_of_segmentation(scenes: Path, tmp_path: Path) -> None:
    config = TrainConfig(task="segment", data=str(scenes), overfit=2, input_size=32, batch_size=2, device="cpu")
    run = prepared(replace(config, out=str(tmp_path / "run"), workers=0))
    names = [[source.file_name(i) for i in range(len(source))] for source in run.sources.values()]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_more_images_than_there_are_cannot_be_overfitted(start: Start) -> None:
    config = start(overfit=25)
    with pytest.raises(ValueError, match="overfit 25: pictures has 24 training images; give that or fewer"):
        train(config)
    assert not config.folder.exists()


class Quadratic(Trainer):
    """Its loss is the square of one weight, which starts at 1: the best step is by 1."""

    largest = 8

    def __init__(self, run: Run, *others: Any) -> None:
        model = torch.nn.Linear(1, 1)
        model.weight.data.fill_(1.0)
        model.num_classes = run.model.num_classes
        super().__init__(replace(run, model=model), *others)

    def batch_loss(self, batch: Any, number: int) -> Any:
        if len(batch[0]) > self.largest:
            raise RuntimeError("CUDA out of memory.")
        loss = self.loss()
        return loss, Seen(number, len(batch[0]), torch.ones(1), {"loss": loss.detach()}, {})

    def loss(self) -> torch.Tensor:
        return self.model.weight.square().sum()


def test_the_rate_found_makes_the_loss_fall_and_nothing_is_left(
    start: Start, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pcenet.training.find.Trainer", Quadratic)
    config = start(find="lr")
    rate = find(config)
    # AdamW moves the weight by the rate in each step, and rates grow by 1e6 ** (1/100) = 1.148 a step: what is behind
    # adds up to 7.8 times the rate, so the weight is 0 near a rate of 0.13, and the loss falls most before that.
    assert 0.001 < rate < 0.2
    assert f"suggestion: --lr {rate:.4g}" in capsys.readouterr().out
    assert not config.folder.exists()
    assert list(temporary.iterdir()) == []


def test_a_rate_is_found_with_the_steps_of_the_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two batches to a step, each of whose losses counts half; what is frozen stays in evaluation mode."""
    counts: list[int] = []
    backward = Trainer.backward

    def watch(self: Trainer, batches: Any, count: int) -> Any:
        given = list(batches)
        counts.append(len(given))
        assert len(given) == count
        assert self.model.training
        return backward(self, given, count)

    monkeypatch.setattr(Trainer, "backward", watch)
    monkeypatch.setattr("pcenet.training.find.STEPS", 15)
    find_lr(prepared(start(model="dense_nano", accumulate=2)))
    assert counts == [2] * 15


def test_a_loss_that_is_no_number_gives_no_rate(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcenet.training.find.Trainer", Quadratic)
    monkeypatch.setattr(Quadratic, "loss", lambda self: self.model.weight.sum() * torch.tensor(float("nan")))
    config = start()
    config.folder.mkdir()
    with pytest.raises(ValueError, match="find 'lr': the loss exploded"):
        find_lr(prepared(config))


@pytest.mark.slow
def test_the_batch_size_found_is_the_largest_that_fits(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcenet.training.find.Trainer", Quadratic)
    config = start()
    config.folder.mkdir()
    assert find_batch_size(prepared(config)) == 8  # 16 of the 24 images do not


@pytest.mark.parametrize("batch_size", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_no_batch_is_larger_than_the_images(start: Start, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    monkeypatch.setattr("pcenet.training.find.Trainer", Quadratic)
    monkeypatch.setattr(Quadratic, "largest", 1000)
    config = start(batch_size=batch_size)
    config.folder.mkdir()
    assert find_batch_size(prepared(config)) == 16  # 32 are more than the 24 images


def test_the_batch_size_is_found_on_a_gpu_alone(start: Start) -> None:
    with pytest.raises(ValueError, match="find 'batch-size' needs a GPU"):
        find(start(find="batch-size"))
