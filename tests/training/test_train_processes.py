"""Several processes train one network as one process does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from several import in_processes, printed
from torch import nn

from pcenet.data import EpochSampler
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runtime.distributed import own_rank, together
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.tasks.evaluation import evaluate
from pcenet.tasks.means import EpochMeans
from pcenet.tasks.segmentation import median_weights
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.loop import Trainer, step_seed
from pcenet.training.preparation import Run, bias_images
from pcenet.training.run import train
from pcenet.training.schedules import Schedules

Start = Callable[..., TrainConfig]

SMALL = {"widths": [8, 8, 16], "num_experts": 3, "capacity_factor": None}


def test_parts_of_an_epoch_are_the_epoch_in_its_order() -> None:
    whole = EpochSampler(23, seed=3).order(1)
    parts = []
    for rank in range(3):
        sampler = EpochSampler(23, seed=3)
        sampler.divide(rank, 3, batch_size=2)
        sampler.set_epoch(1)
        parts.append([index for _, index in sampler])
        assert len(sampler) == len(parts[-1]) == 6  # 3 whole batches for each: 18 of 23 images
    batches = [parts[rank][2 * batch : 2 * batch + 2] for batch in range(3) for rank in range(3)]
    assert [index for batch in batches for index in batch] == whole[:18]


def test_a_part_goes_on_within_an_epoch() -> None:
    sampler = EpochSampler(23, seed=3)
    sampler.divide(1, 2, batch_size=2)
    order = sampler.order(4)
    sampler.start_at(4, 6)
    assert list(sampler) == [(4, index) for index in order[6:]]


def test_parts_of_an_evaluation_have_each_image_once() -> None:
    parts = []
    for rank in range(4):
        sampler = EpochSampler(10, shuffle=False)
        sampler.divide(rank, 4, batch_size=2)
        parts.append([index for _, index in sampler])
        assert len(sampler) == len(parts[-1])
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert sorted(index for part in parts for index in part) == list(range(10))


def test_chance_within_a_step_is_each_process_s_own(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({step_seed(0, 7, rank) for rank in range(8)}) == 8
    ranks: list[int] = []
    monkeypatch.setattr("pcenet.training.loop.own_rank", lambda: 3)
    monkeypatch.setattr(
        "pcenet.training.loop.step_seed", lambda seed, batch, rank: ranks.append(rank) or step_seed(seed, batch, rank)
    )
    train(start(epochs=1))
    assert set(ranks) == {3}


@pytest.mark.parametrize(("length", "shuffle"), [(11, True), (2, False)])
def test_too_few_images_for_all_processes(length: int, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=rf"devices 3: {length} images are too few .* fewer --devices"):
        EpochSampler(length, shuffle=shuffle).divide(0, 3, batch_size=4)


def test_the_mean_of_processes_of_which_one_has_seen_nothing(tmp_path: Path) -> None:
    """Two images with mean 1 and one with 4 make 2, whoever has seen them; without images there is no mean."""

    def work() -> int:
        with together(ranks_of_environment(), torch.device("cpu"), minutes=0.5):
            means = EpochMeans()
            assert means.compute() == {}
            if own_rank() == 0:
                means.update({"loss": torch.tensor(1.0)}, 2)
                means.update({"loss": torch.tensor(4.0)}, 1)
            assert {name: float(value) for name, value in means.compute().items()} == {"loss": 2.0}
        return 0

    assert in_processes(work, tmp_path) == [0, 0], printed(tmp_path)


def in_float64_with_sgd(patch: pytest.MonkeyPatch) -> None:
    """What makes runs comparable to rounding, and ends them after training."""
    begin, forward, images = Trainer.__init__, Trainer.forward, bias_images

    def doubled(self: Trainer, run: Run, *arguments: Any) -> None:
        run.model.double()
        begin(self, run, *arguments)

    patch.setattr(Trainer, "__init__", doubled)
    patch.setattr(Trainer, "forward", lambda self, network, images: forward(self, network, images.double()))
    patch.setattr("pcenet.training.loop.bias_images", lambda run: (batch.double() for batch in images(run)))
    patch.setattr("pcenet.tasks.segmentation.median_weights", lambda counts: median_weights(counts).double())
    patch.setattr("pcenet.training.run.finish", lambda *_: None)

    def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), momentum=0.9)

    patch.setattr("pcenet.training.loop.make_optimizer", sgd)
    patch.setattr(Schedules, "learning_rate_factor", lambda self, step: 0.05 / self.config.lr)


def streets(folder: Path) -> Path:
    """Images with masks, most of whose pixels do not count in some, and few in others."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(20):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            mask = rng.integers(0, 3, (32, 32), dtype=np.uint8)
            mask[: rng.integers(0, 32)] = 255
            Image.fromarray(image).save(folder / split / "images" / f"{index:02}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{index:02}.png")
    return folder


def figures_of(folder: RunFolder) -> dict[str, float]:
    """The only row of ``metrics.csv``."""
    with open(folder.logs / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items()}


CASES = [
    pytest.param("classify", "ddp"),
    pytest.param("classify", "fsdp", marks=pytest.mark.slow),
    pytest.param("segment", "ddp", marks=pytest.mark.slow),
    pytest.param("segment", "fsdp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("task", "strategy"), CASES)
def test_two_processes_train_as_one(
    task: str, strategy: str, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Five steps, the same images in each: weights within 1e-8, and the same figures."""
    in_float64_with_sgd(monkeypatch)
    options: dict[str, Any] = {"model_args": SMALL, "augment": "none", "epochs": 1, "max_images": 20}
    if task == "segment":
        sizes = {"model_args": SMALL | {"widths": [8, 8, 8]}, "input_size": "32x32", "class_weights": "median"}
        options |= {"task": task, "data": str(streets(tmp_path / "streets"))} | sizes
    one = train(start("one", batch_size=4, **options))
    config = start("two", batch_size=2, sync_batch_norm=True, strategy=strategy, **options)
    assert in_processes(lambda: train(config) and 0, tmp_path / "printed") == [0, 0], printed(tmp_path / "printed")
    two = RunFolder(config.folder)
    ours, theirs = (read_checkpoint(folder.steps[-1]) for folder in (one, two))
    assert ours["step"] == theirs["step"] == 5
    for key in ("model", "averaged"):
        assert ours[key].keys() == theirs[key].keys()
        for name, value in ours[key].items():
            assert (value - theirs[key][name]).abs().max() < 1e-8, name
    expected, found = (figures_of(folder) for folder in (one, two))
    for name, value in expected.items():
        if "second" not in name:
            assert found[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_is_measured_is_measured_once(strategy: str, start: Start, tmp_path: Path) -> None:
    """An odd number of images in two processes, and what one process says of the network that they have left."""
    options = {"data": "digits", "max_images": 16, "batch_size": 4, "epochs": 1, "model_args": SMALL}
    config = start("two", strategy=strategy, **options)
    assert in_processes(lambda: train(config) and 0, tmp_path / "printed") == [0, 0], printed(tmp_path / "printed")
    found = json.loads(RunFolder(config.folder).metrics.read_text())
    expected = evaluate(EvalConfig(str(config.folder), device="cpu", precision="fp32", workers=0))
    assert expected.images % 2 == 1
    assert found["val"].pop("images") == expected.images
    for name, value in found["val"].items():
        assert value == pytest.approx(getattr(expected, name), abs=1e-6), name
    row = figures_of(RunFolder(config.folder))
    assert row["val/top1"] == pytest.approx(expected.top1, abs=1e-6)
    assert row["val/loss"] == pytest.approx(expected.loss, abs=1e-5)
    lines = printed(tmp_path / "printed")
    assert "2 processes" in lines[0]
    assert lines[1] == ""
